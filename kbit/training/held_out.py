"""How much of a training's text is held back from it. Nothing here loads torch, as a study is planned with it."""

from __future__ import annotations

from typing import Final

_WINDOWS: Final = 64  # held back. With 256 tokens each the interval of their mean is +-0.06 nats
_PART: Final = 16  # of a short text: a sixteenth


def count_held(windows: int) -> int:
    """Return how many of a text's windows are held back: 64, or a sixteenth of a short text and at least one."""
    return max(1, min(_WINDOWS, windows // _PART))


def count_needed(batch_size: int) -> int:
    """Return the least number of windows of a text of which a batch is left to train on."""
    windows = batch_size + 1
    while windows - count_held(windows) < batch_size:
        windows += 1
    return windows
