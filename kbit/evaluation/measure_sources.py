"""Where a measure of one's own is written: found, read and identified by its content, without being imported.

Only the file with the class is identified. What that file imports from beside itself is not part of the key. Of a
module in packages, Python imports the packages to find it.

eval.measures names it as MODULE:CLASS or as FILE.py:CLASS. A module is looked for beside the current directory first,
then on Python's path.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kbit.checks import ask_for_nearest


@dataclass(frozen=True)
class MeasureSource:
    """A class in a source file.

    Attributes:
        asked: what eval.measures says, such as "my_measure.py:Repetition".
        module: the module's name, such as "my_measure".
        cls: the name of the class.
        path: the source file.
        content: the file's content. It is what is executed, so that the hash cannot belong to another one.
    """

    asked: str
    module: str
    cls: str
    path: Path
    content: bytes

    @property
    def sha256(self) -> str:
        """The hash of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def identity(self) -> str:
        """What names the measure wherever its file lies: the class, and the beginning of the content's hash."""
        return f"{self.cls}@{self.sha256[:16]}"


def read_source(asked: str) -> MeasureSource:
    """Return the source of a measure as eval.measures names it.

    Raises:
        ValueError: there is no such module or file.
    """
    place, _, cls = asked.rpartition(":")
    path = Path(place) if place.endswith(".py") else _find_module(place)
    if path is None or not path.is_file():
        what = f"no file at {path.resolve()}" if path else f"no module {place!r} on Python's path or in {Path.cwd()}"
        raise ValueError(f"eval.measures={asked!r}: there is {what}{_find_near(place)}")
    module = path.stem if place.endswith(".py") else place
    return MeasureSource(asked, module, cls, path.resolve(), path.read_bytes())


def identify_measures(measures: Sequence[str]) -> list[str]:
    """Return what names these measures wherever they lie, sorted.

    Raises:
        ValueError: see read_source.
    """
    return sorted(read_source(asked).identity for asked in measures)


def _find_near(place: str) -> str:
    """Return a question about the file or module in the current directory whose name is near, if there is one."""
    here = [path.name if place.endswith(".py") else path.stem for path in Path.cwd().glob("*.py")]
    near = ask_for_nearest(Path(place).name, here)
    return f"; {near}" if near else ""


def _find_module(name: str) -> Path | None:
    """Return the file of a module."""
    beside = Path.cwd().joinpath(*name.split("."))
    for path in (beside.with_name(f"{beside.name}.py"), beside / "__init__.py"):
        if path.is_file():
            return path
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # a folder above it is missing or cannot be imported, or the name has no sense as one
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin is not None else None
