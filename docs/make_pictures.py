"""Draws the example pictures of docs/reference from a store: `python docs/make_pictures.py STORE [NAME ...]`.

The pictures that are committed are of the study nano/gallery (`make pictures`). Those of cost_accuracy, cost_loss,
time_per_token and time_by_bits are of nano/speed. Those of trainings, activations and caches are of the studies that
docs/reference/figures.md names beside them. All of these are drawn by their names.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure
from PIL import Image

import kbit
from kbit.analysis.figures.drawing import MissingResults

PICTURES: Final = Path(__file__).resolve().parent / "pictures"
DPI: Final = 75  # at the figures' own sizes this is about the width of a page
COLOURS: Final = 256  # a palette has a third of the bytes
TYPES: Final = ("int4", "float4", "dynamic4", "nf4")


def save(figure: Figure, name: str) -> None:
    """Write a figure as a small PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(PICTURES / f"{name}.png", optimize=True)


def main(store: str, *names: str) -> None:
    """Draw the pictures that are named, or all, and print which figures the store does not allow."""
    PICTURES.mkdir(exist_ok=True)
    if not names:
        save(kbit.plot_codebooks(TYPES), "codebooks")
    results = kbit.read_results(store)
    for name in names or kbit.figures.names():
        try:
            save(kbit.figures.draw(name, results, caption="short"), name)
        except MissingResults as reason:
            print(f"{name}: {reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
