"""Where a local store keeps what belongs to a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingFiles:
    """The files of one experiment's training.

    Attributes:
        checkpoint: the training while it is not done, to go on from.
        adapters: folder of trained adapters.
    """

    checkpoint: Path
    adapters: Path
