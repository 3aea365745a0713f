"""Records that cannot be read: how they are named, why, and whether removing them loses something.

One bad file must not hide thousands of good ones. Whoever reads a store leaves such a record out and warns of it
(DamagedRecordWarning). The command line shows each warning once and exits with 3 (kbit.cli.main).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from kbit.experiments.check_types import check_types
from kbit.experiments.serialize import from_json

T = TypeVar("T")
SCHEMA_VERSION: Final = 1


class DamagedRecord(ValueError):
    """A record, or a whole file, that cannot be read.

    Args:
        root: the store.
        name: name of the file in the store.
        reason: why it cannot be read.
        key: the record's key in a file of many, or "" for the records there that have none. None is the whole file.
        is_foreign: whether it may be whole: written by a newer kbit, or with an extension that is not registered here.
        experiments: the number of experiments in a whole file of many, if it can be told.
    """

    def __init__(
        self,
        root: str,
        name: str,
        reason: str,
        *,
        key: str | None = None,
        is_foreign: bool = False,
        experiments: int | None = None,
    ) -> None:
        place = f"{root}/{name}" if key is None else f"{root}/{name}, {key or 'records without a key'}"
        super().__init__(f"{place} {'' if is_foreign else 'is damaged: '}{reason}")
        self.name = name
        self.key = key
        self.is_foreign = is_foreign
        self.experiments = experiments


class DamagedRecordWarning(UserWarning):
    """A record of a store was left out, because it cannot be read.

    Attributes:
        error: which record it is, and why.
    """

    def __init__(self, error: DamagedRecord) -> None:
        super().__init__(str(error))
        self.error = error


def set_aside(error: DamagedRecord) -> None:
    """Warn that a record is left out."""
    warnings.warn(DamagedRecordWarning(error), stacklevel=2)


class Source:
    """The place of one record in a store. Its errors name it.

    Args:
        root: the store.
        name: name of the file in the store.
        key: the key that the record must have.
        is_part: whether the file holds many records.
    """

    def __init__(self, root: str, name: str, key: str, *, is_part: bool = False) -> None:
        self.name = name
        self._root = root
        self._key = key
        self._part_key = key if is_part else None

    def refuse(self, reason: object, *, is_foreign: bool = False) -> DamagedRecord:
        """Return the error that this record cannot be read."""
        return DamagedRecord(self._root, self.name, str(reason), key=self._part_key, is_foreign=is_foreign)

    def parse(self, content: bytes | str) -> dict[str, Any]:
        """Return the record that JSON holds.

        Raises:
            DamagedRecord: the content is no record or another experiment's, or was written by a newer kbit.
        """
        try:
            record = json.loads(content)
        except (TypeError, ValueError, RecursionError) as error:  # a null in a Parquet file is a TypeError
            raise self.refuse(error) from None
        if not isinstance(record, dict):
            raise self.refuse(f"it holds {record!r:.40}, which is no record")
        version = record.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise self.refuse(f"schema_version={version!r:.40} is no version")
        if version > SCHEMA_VERSION:
            raise self.refuse(_describe_newer(record, version), is_foreign=True)
        if record.get("key") != self._key:
            raise self.refuse(f"it holds the record of {record.get('key')!r:.40}")
        return record

    def read(self, kind: type[T], record: Mapping[str, Any]) -> T:
        """Return a record as a dataclass whose values have their types.

        Raises:
            DamagedRecord: a field is missing or not of its type, or this kbit does not know a name in it.
        """
        try:
            check_types(kind, record)
            return from_json(kind, record)
        except UnicodeError as error:
            raise self.refuse(error) from None
        except ValueError as error:  # of a dataclass' own checks
            raise self.refuse(f"cannot be read by this kbit: {error}", is_foreign=True) from error
        except Exception as error:  # a check that meets another type than it expects raises anything
            raise self.refuse(error) from error


def _describe_newer(record: Mapping[str, Any], version: int) -> str:
    """Return which kbit reads a record of a newer schema."""
    versions = record.get("versions")
    writer = versions.get("kbit") if isinstance(versions, dict) else None
    needed = f"kbit {writer}" if isinstance(writer, str) else "a newer kbit"
    return f"was written by a newer kbit: it has schema {version}, this kbit reads {SCHEMA_VERSION}; use {needed}"
