"""What is kept of a measurement of time and memory beside its numbers. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TASK: Final = "speed"
_BATCH: Final = f"{TASK}/batch_"


def name_batch(batch: int) -> str:
    """Return the task of a batch's numbers."""
    return f"{_BATCH}{batch}"


def find_batch(task: str) -> int | None:
    """Return the batch whose numbers have this task, or None of another task."""
    return int(task.removeprefix(_BATCH)) if task.startswith(_BATCH) else None


@dataclass(frozen=True)
class BatchRecord:
    """How one batch went.

    Attributes:
        batch: the number of sequences.
        reason: why there are no times ("oom": memory ran out, "oom beside 3 others" of models that are in memory at
            once), or "".
        step_path, prompt_path: how many linear layers took which path in a step and in the prompt: "fused 24, plain 1".
        peak_bytes: the weights, and the most that was allocated beside them. It is None where there are no times, and
            where memory ran out while it was measured.
    """

    batch: int
    reason: str
    step_path: str
    prompt_path: str
    peak_bytes: int | None = None


@dataclass(frozen=True)
class SpeedRecord:
    """The machine and the model that time and memory were measured of.

    Attributes:
        processor: the name of the CPU or of the card.
        host: a word for the computer since its last start, so that two of one kind are not taken for one. "" in records
            of earlier versions.
        threads: the threads of torch and of the kernels.
        prompt, new, repetitions: see kbit.evaluation.config.SpeedConfig.
        gigaflops: the speed of one fixed product of float32 matrices, before and after: the noise of the clock.
        gigabytes_per_second: the speed at which memory was read, before and after.
        weight_bytes: the bytes of the weights in memory, tied ones once.
        counted_bytes: what kbit counts for them: total_bits / 8. It is None where nothing was counted.
        read_bytes: the bytes of the weights that a step reads: all but an embedding of which it takes some rows. It is
            None of a model with experts, where the tokens decide.
        packed_share: the share of all parameters that are packed in memory. 0 of a plain model.
        batches: how each batch went.
    """

    processor: str
    threads: int
    prompt: int
    new: int
    repetitions: int
    gigaflops: tuple[float, ...]
    gigabytes_per_second: tuple[float, ...]
    weight_bytes: int
    counted_bytes: float | None
    read_bytes: int | None
    packed_share: float
    batches: tuple[BatchRecord, ...]
    host: str = ""

    def describe_conditions(self) -> str:
        """Return what two measurements must share to be compared: the machine, and how many tokens were generated."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        host = f" ({self.host})" if self.host else ""
        return f"{self.processor}{host}, {threads}, {self.prompt} + {self.new} tokens"
