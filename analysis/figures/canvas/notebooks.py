"""What a notebook needs to show matplotlib figures."""

from __future__ import annotations

import io
import sys

from matplotlib.figure import Figure


def show_figures() -> None:
    """Let a notebook show a figure that is a cell's last value as a picture.

    Jupyter does this by itself for pyplot's figures alone, and kbit's are none: they would be shown as a line of text.
    Outside a notebook this does nothing.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, encode_png)


def encode_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
