"""The store of results: `Store` writes it, the `read_` functions read it.

Names are imported on first use, so that a caller who needs only a file's name does not wait for pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.store.items import read_items as read_items
    from kbit.store.items import read_items_by_task as read_items_by_task
    from kbit.store.readers import list_keys as list_keys
    from kbit.store.readers import read_failures as read_failures
    from kbit.store.readers import read_features as read_features
    from kbit.store.readers import read_provenance as read_provenance
    from kbit.store.readers import read_results as read_results
    from kbit.store.records import read_records as read_records
    from kbit.store.store import Store as Store


_NAMES = {
    "items": ("read_items", "read_items_by_task"),
    "records": ("read_records",),
    "readers": ("list_keys", "read_failures", "read_features", "read_provenance", "read_results"),
    "store": ("Store",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"kbit.store.{module}"), name)
    raise AttributeError(f"module 'kbit.store' has no attribute {name!r}")
