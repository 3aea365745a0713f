"""Devices by name, and how much memory they have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kbit.checks import read_bytes, suggest

GB: Final = 10**9
CARD_OVERHEAD: Final = GB  # bytes that a card loses to its driver and libraries: assumed, not measured

# Memory of one card in GB, as its vendor states it. A vendor's GB has 2^30 bytes for most cards. Here it has 10^9: up
# to 7% of a card stay free. Cards that come in two sizes have the size in their name.
CARDS: Final = {
    "p100": 16, "v100-16gb": 16, "v100-32gb": 32, "t4": 16, "rtx2080ti": 11, "rtx3060": 12, "rtx3080": 10,
    "rtx3090": 24, "rtx4080": 16, "rtx4090": 24, "rtx5090": 32, "a10": 24, "l4": 24, "a40": 48, "l40s": 48,
    "rtxa6000": 48, "a100-40gb": 40, "a100-80gb": 80, "h100": 80, "h200": 141, "b200": 192, "mi300x": 192,
}  # fmt: skip
_COUNTED: Final = (re.compile(r"(?P<cards>\d+)x(?P<what>.+)"), re.compile(r"(?P<what>.+)x(?P<cards>\d+)"))


@dataclass(frozen=True)
class Hardware:
    """One or several equal cards.

    Attributes:
        name: the name as it was asked for.
        cards: the number of cards.
        card_bytes: the memory of one.
        is_card: whether cards were named, and not an amount of memory.
    """

    name: str
    cards: int
    card_bytes: float
    is_card: bool = False

    def count_available(self, overhead: float) -> float:
        """Return the bytes that are left when each card has its overhead. Layers are taken to divide evenly."""
        return self.cards * max(0.0, self.card_bytes - overhead)


def parse_hardware(text: str, option: str = "--hardware") -> Hardware:
    """Return the hardware that is named, such as rtx3090, rtx3090x4, 4xrtx3090, 24GB, 24GiB, 800MB or 8x24GB.

    Raises:
        ValueError: it names neither a known card nor an amount of memory.
    """
    asked = text.strip()
    found = [match for pattern in _COUNTED if (match := pattern.fullmatch(asked))]
    for cards, what in [(1, asked), *((int(match["cards"]), match["what"]) for match in found)]:
        memory = read_bytes(what)
        size = GB * CARDS.get(what.lower(), 0) if memory is None else memory
        if cards and size:
            return Hardware(asked, cards, size, memory is None)
    raise ValueError(
        f"{option} {asked!r} is neither an amount of memory (24GB, 4x24GB) nor a card (rtx3090, 4xrtx3090); "
        f"{suggest(asked.lower(), CARDS)}"
    )
