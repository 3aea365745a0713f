"""Numbers as people write them: bits and counts with their unit."""

from __future__ import annotations

from typing import Final

UNITS: Final = ((1e12, "Tbit"), (1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit"))


def format_bits(total_bits: float, position: int | None = None) -> str:
    """Return for example "20 Mbit". Matplotlib's formatters also pass a `position`."""
    for size, unit in UNITS:
        if total_bits >= size:
            return f"{total_bits / size:.3g} {unit}"
    return f"{total_bits:g} bit"


def format_count(value: float) -> str:
    """Return for example "300k", "1.3M" or "7B"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"
