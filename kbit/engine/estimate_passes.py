"""Estimates of what trainings and allocations take beside a model: states, gradients, activations and logits."""

from __future__ import annotations

from typing import Final, NamedTuple

from kbit.methods.config import QuantConfig
from kbit.methods.options import TOKENS_AT_ONCE, CalibrationConfig
from kbit.models.config import MAX_WINDOW
from kbit.models.size import ModelSize
from kbit.numerics.spec import BASELINE_BITS
from kbit.training.config import TrainConfig

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
USUAL_VOCABULARY: Final = 50_000  # of a model that is not here
BACKWARD: Final = 3  # a training step takes three forward passes: one, and two products where it has one
_STATES: Final = 3  # a gradient, a momentum and a variance
_BLOCK_MATRICES: Final = 12  # h^2 parameters of a block: 4 of attention, 8 of the feed-forward layer
_KEPT_PER_LAYER: Final = 17  # values of h that a block keeps of a token for its backward pass (34 bytes at 16 bits)
_LOGITS: Final = 3
_TENSORS: Final = 7  # matrices of a block, at most: four of attention, three of a gated feed-forward layer


def estimate_training(size: ModelSize, train: TrainConfig) -> int:
    """Estimate the bytes that a training takes beside the model.

        gradients and states of each parameter + activations of each token + logits, their softmax and their gradient

    Everything has 32 bits. Quantization-aware training keeps the rounded weights as well. Replicas are computed one
    after the other: each sees its part of the batch, and keeps its gradient until all are averaged, with error feedback
    also what rounding lost. Adapters count as nothing, and so do states of fewer bits, which save less than the
    activations take.
    """
    if not train.steps:
        return 0
    tokens = train.batch_size // train.replicas * (train.context or min(size.context, MAX_WINDOW))
    states = 0 if train.lora.rank else (_STATES + train.is_aware + _count_copies(train)) * size.parameters
    return round(BYTES["float32"] * (states + tokens * (_count_activations(size) + _LOGITS * _count_vocabulary(size))))


def _count_copies(train: TrainConfig) -> int:
    """Return how many numbers replicas keep of each parameter: their gradients, and what rounding has lost of them."""
    if train.replicas == 1:
        return 0
    has_feedback = train.error_feedback and train.quantizes("exchange")
    second_shot = train.exchange_form == "two_shot"  # the owners' means, which are one more gradient together
    return train.replicas + has_feedback * (train.replicas + second_shot)


def estimate_allocation(size: ModelSize, quant: QuantConfig, width: int) -> int:
    """Estimate the bytes that the losses of quant.allocation take beside the model.

        kl       the 16-bit model's chances, the logits with one unit quantized, and their product
        fisher   information and gradients of each parameter + activations, logits, their softmax and their gradient

    Logits and information are in float32. All parameters count as quantized.

    Args:
        size: the model's size.
        quant: the quantizer. Without a budget, and with objective=error, nothing is taken.
        width: the bytes of a number in the model's dtype.
    """
    if not quant.allocation.needs_text:
        return 0
    single, length = BYTES["float32"], _find_length(size, quant.calibration)
    if quant.allocation.objective == "kl":
        windows = min(quant.calibration.samples, max(1, TOKENS_AT_ONCE // length))
        return single * _LOGITS * windows * length * _count_vocabulary(size)
    logits = single * _LOGITS * length * _count_vocabulary(size)
    return (single + width) * size.parameters + round(width * length * _count_activations(size)) + logits


class AllocationClass(NamedTuple):
    """The properties that decide how long the losses of an allocation take. The budget is none of them.

    Attributes:
        objective: the objective.
        unit: what is chosen for at once.
        choices: the number of choices that lose something.
        calibration: the text, or None if it is not looked at.
    """

    objective: str
    unit: str
    choices: int
    calibration: CalibrationConfig | None

    @staticmethod
    def of(quant: QuantConfig) -> AllocationClass | None:
        """Return the class of a quantizer, or None without a budget."""
        config = quant.allocation
        if not quant.allocates:
            return None
        choices = len({*config.choices} - {BASELINE_BITS})
        return AllocationClass(config.objective, config.unit, choices, quant.calibration if config.needs_text else None)

    def count_tokens(self, size: ModelSize) -> int:
        """Estimate how many tokens go forward through the model, where a backward pass counts as two."""
        if self.calibration is None:
            return 0
        passes: float = BACKWARD
        if self.objective == "kl":
            units = _count_layers(size) * (_TENSORS if self.unit == "tensor" else 1)
            passes = 1 + units * self.choices
        return round(passes * self.calibration.samples * _find_length(size, self.calibration))


def _find_length(size: ModelSize, text: CalibrationConfig) -> int:
    return text.length or min(size.context, MAX_WINDOW)


def _count_vocabulary(size: ModelSize) -> int:
    return size.vocabulary or USUAL_VOCABULARY


def _count_activations(size: ModelSize) -> float:
    return _KEPT_PER_LAYER * _count_layers(size) * size.hidden


def _count_layers(size: ModelSize) -> float:
    """Return the number of decoder layers at most: embeddings count as layers here."""
    return size.parameters / (_BLOCK_MATRICES * size.hidden**2)
