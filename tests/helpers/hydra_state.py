"""Keeps Hydra's global state the same from one test to the next.

A command registers its own schemas in that state and leaves them there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins


@contextmanager
def config_store_kept() -> Iterator[None]:
    """Undo, at the end of the with block, what the block registers in Hydra's store of schemas or takes out of it."""
    Plugins.instance()  # fills the store the first time that it is asked for
    store = ConfigStore.instance()
    before, store.repo = store.repo, copy.deepcopy(store.repo)
    try:
        yield
    finally:
        store.repo = before
