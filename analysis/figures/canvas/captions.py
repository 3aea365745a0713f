"""Captions: the text below a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure, SubFigure

from kbit.analysis.figures.canvas.page import Page, StyledFigure, get_line_height, get_small_size, wrap_text

MARGIN: Final = 0.1  # inches
NOTHING: Final = 1e-3  # the share of a caption's height before there is one, as it cannot be 0
LEAST_DRAWING: Final = 1.0  # inches: what a caption leaves of a page's height


class TooSmallPage(ValueError):
    """A page without room for what is to be drawn."""


class CaptionedFigure(StyledFigure):
    """A figure that can get a caption.

    Attributes:
        body: the part above the caption, for panels, labels and legends: all of the figure, until write_caption makes
            room.
        parts: how the body and the caption share the height.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        self.parts = self.add_gridspec(2, 1, height_ratios=[1, NOTHING])
        self.body: SubFigure = self.add_subfigure(self.parts[0])


def write_caption(fig: Figure, paragraphs: Sequence[str], page: Page) -> None:
    """Write paragraphs below a drawing, which grows by their height.

    A figure of panels stays as high as the page says. A table has the size of its text on every page, so it grows.

    Raises:
        TooSmallPage: the page's height leaves too little for the drawing.
    """
    if not paragraphs:
        return
    width, height = fig.get_size_inches()
    size = get_small_size()
    lines = [line for paragraph in paragraphs for line in wrap_text(paragraph, 0.98 * width - 2 * MARGIN, size)]
    room = len(lines) * get_line_height(size) + 2 * MARGIN
    if page.height is None or not isinstance(fig, CaptionedFigure):
        height += room
        fig.set_size_inches(width, height)
    elif height - room < LEAST_DRAWING:
        raise TooSmallPage(
            f"a caption of {room:.2f} inches leaves too little of a height of {height:.2f} inches: "
            "give a larger --height or --caption none"
        )
    share = room / height
    if isinstance(fig, CaptionedFigure):
        fig.parts.set_height_ratios([1 - share, share])
    else:  # a table, whose axes fill the figure
        fig.axes[0].set_position((0.0, share, 1.0, 1.0 - share))
    text = "\n".join(lines)
    fig.text(MARGIN / width, MARGIN / height, text, fontsize=size, va="bottom", linespacing=1.3, parse_math=False)
