"""The rounds of a study that stops when it knows: which items and windows each of them measures.

    round 1   an eighth of the items          round 3   a half
    round 2   a quarter                       round 4   all

A round measures the first items of one random order, so that each contains the one before. The order depends on nothing
but the number of items: all variants, models and tasks share it, and whatever two experiments measured, the smaller set
is part of the larger one.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

SHARES: Final = (0.125, 0.25, 0.5, 1.0)  # of the items, after each round
LAST: Final = len(SHARES)
WORDS: Final = ("none", "an eighth", "a quarter", "a half", "all")  # by the number of rounds
TASKS, TEXT = "tasks", "text"  # the parts of an evaluation, each of which goes on for as long as it is needed
PARTS: Final = (TASKS, TEXT)

Places = NDArray[np.intp]


@functools.lru_cache(maxsize=64)
def order_items(total: int) -> Places:
    """Return the places 0 .. total - 1 in random order: by the hash of each, which no version of a library changes."""
    hashes = [hashlib.sha256(f"kbit item {place}".encode()).digest() for place in range(total)]
    return np.asarray(sorted(range(total), key=hashes.__getitem__), dtype=np.intp)


def list_places(total: int, rounds: int) -> Places:
    """Return the places of the items that are measured after so many rounds, ascending. After 0 there are none."""
    count = math.ceil(total * SHARES[rounds - 1]) if rounds else 0
    return np.sort(order_items(total)[:count])
