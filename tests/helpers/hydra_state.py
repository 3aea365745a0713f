"""Hydra's global state, kept from one test to the next: a command registers its own schemas and leaves them there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins


@contextmanager
def config_store_kept() -> Iterator[None]:
    """Let what is registered in Hydra's store of schemas, or taken out of it, end with the block."""
    Plugins.instance()  # fills the store the first time that it is asked for
    store = ConfigStore.instance()
    before, store.repo = store.repo, copy.deepcopy(store.repo)
    try:
        yield
    finally:
        store.repo = before
