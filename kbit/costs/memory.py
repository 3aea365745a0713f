"""How much memory a model takes at run time and in training, by formula.

    inference = weights + KV cache + activations + overhead
    training  = inference's weights, gradients and optimizer states + activations + overhead

Everything beside the quantized weights has 16 bits, but for logits, master weights and optimizer states. Numbers are
bytes, and a GB is 10^9 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kbit.checks import check_choice
from kbit.costs.shapes import ModelShape
from kbit.methods.config import QuantConfig

_WIDTH: Final = 2  # bytes of a 16-bit number
_LOGIT: Final = 4  # bytes: logits are computed in float32
# Hidden states of one token that are in memory at once: the residual stream, attention's output, the inner layer before
# and after its activation (4 + 4), and its output with a copy. Measured: 12.0 in GPT-NeoX. In Llama, whose inner
# layer is gated, 11.9 with its logits (benchmarks/memory.py).
_STATES: Final = 12
_LONGEST: Final = 2**20  # tokens: the longest context that is looked for where a model does not say its own
_PROMPT_CHUNK: Final = 2048  # tokens of a prompt that go through the model at once
# Bytes for each trained parameter. adam: weight 2, gradient 2, master weight 4, two states of 4. adam8 has two states
# of one byte and no master weight (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").
_TRAINED_BYTES: Final = {"adam": 2 + 2 + 4 + 8, "adam8": 2 + 2 + 2}
# Activations that a layer keeps for the backward pass: s b h (34 + 5 a s / h) bytes (Korthikanti et al. 2022, eq. 2).
_KEPT_LINEAR, _KEPT_SQUARE = 34, 5
TRAININGS: Final = ("none", "adam", "adam8", "lora")


@dataclass(frozen=True)
class Use:
    """How a model is used.

    Attributes:
        context: tokens of each sequence. 0 leaves out the KV cache and the activations.
        batch: sequences at once.
        train: none is inference. adam and adam8 train every weight at 16 bits. lora trains adapters beside a base that
            may be quantized.
        rank: the rank of lora's adapters.

    Raises:
        ValueError: a number below its least value, or an unknown training.
    """

    context: int = 2048
    batch: int = 1
    train: str = "none"
    rank: int = 64

    def __post_init__(self) -> None:
        check_choice("--train", self.train, TRAININGS)
        for name, least in (("context", 0), ("batch", 1), ("rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} is less than {least}")


@dataclass(frozen=True)
class Memory:
    """The bytes that a model takes.

    Attributes:
        weights: the weights as they are stored.
        training: gradients, master weights and optimizer states, and lora's adapters.
        cache: keys and values of every token of the context.
        activations: what a forward pass, or a training step, has in memory at once.
    """

    weights: int
    training: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.training + self.cache + self.activations


def count_memory(shape: ModelShape, quant: QuantConfig, use: Use) -> Memory:
    """Return the bytes that a model takes at a precision.

    Raises:
        ValueError: a training that changes the weights themselves, with a quantizer.
    """
    if use.train in _TRAINED_BYTES and not quant.is_baseline:
        raise ValueError(
            f"--train {use.train} changes the weights, which {quant.label()} has rounded: --bits 16, or lora"
        )
    weights = math.ceil(shape.count_weight_bits(quant) / 8)
    if use.train == "none":
        return Memory(weights, 0, _count_cache(shape, use), _count_activations(shape, quant, use))
    if use.train == "lora":
        training = _TRAINED_BYTES["adam"] * shape.count_adapter_parameters(use.rank)
    else:
        training = (_TRAINED_BYTES[use.train] - _WIDTH) * shape.parameters
    return Memory(weights, training, 0, _count_kept_activations(shape, quant, use))


def count_cache_per_token(shape: ModelShape) -> int:
    """Return the bytes of the keys and values of one token, in all layers, as if each kept the whole context."""
    return shape.cached_values * _WIDTH


def _count_cache(shape: ModelShape, use: Use) -> int:
    return count_cache_per_token(shape) * use.batch * use.context


def _count_activations(shape: ModelShape, quant: QuantConfig, use: Use) -> int:
    """Return the bytes of a decoder layer's states, the last token's logits, and one dequantized matrix."""
    if use.context == 0:
        return 0
    states = _WIDTH * _STATES * shape.hidden * use.batch * min(use.context, _PROMPT_CHUNK)
    return states + _LOGIT * use.batch * shape.vocabulary + _count_dequantized(shape, quant)


def _count_dequantized(shape: ModelShape, quant: QuantConfig) -> int:
    """Return the bytes of the largest matrix at 16 bits, which a quantized one is for its product."""
    return 0 if quant.is_baseline else _WIDTH * max(map(math.prod, shape.matrices), default=0)


def _count_kept_activations(shape: ModelShape, quant: QuantConfig, use: Use) -> int:
    """Return the bytes that the backward pass needs, without checkpointing, and the logits with their gradient."""
    if use.context == 0:
        return 0
    tokens = use.batch * use.context
    a_layer = tokens * (_KEPT_LINEAR * shape.hidden + _KEPT_SQUARE * shape.heads * use.context)
    return shape.layers * a_layer + 2 * _LOGIT * tokens * shape.vocabulary + _count_dequantized(shape, quant)


def find_longest_context(shape: ModelShape, count: Callable[[int], int], available: float) -> int:
    """Return the most tokens, up to the model's own context, whose bytes are available. 0: not even one.

    Args:
        shape: the model.
        count: returns the bytes for so many tokens, which rise with them.
        available: the bytes that there are.
    """
    low, high = 0, (shape.context or _LONGEST) + 1  # low fits, or is 0, and high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= available else (low, middle)
    return low
