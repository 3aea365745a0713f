"""Linear layers whose inputs are quantized at run time: y = Q(x) W^T + b.

The product is that of the layer as it is, so that Q is a simulation of the numbers (fake quantization), and not of the
speed. Scales are found anew for each call (dynamic). Input dimensions that stay at 16 bits in the weight do so in the
input, and decide no scale, as in int8 products (kbit.layers.int8_linear). Where a weight has a scale for each input
(AWQ), x / s is what is quantized, since the codes are those of W s. Where a weight is quantized in a rotation, the
input is, too (kbit.layers.run_time.rotation).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.run_time.forwards import Forward
from kbit.layers.run_time.residual import FindBasis
from kbit.layers.run_time.rotation import Basis
from kbit.layers.run_time.straight_through import round_straight
from kbit.layers.run_time.transient import ActivationConfig, check_blocks, sees_whole_tensor, with_own_seed
from kbit.models.parameters import as_matrix, owner_of
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import QuantSpec

_ROLE: Final = "quant.activations"


class QuantizedInput(Forward):
    """The forward of a linear layer whose input is quantized: takes the place of module.forward.

    Attributes:
        layer: the linear layer.
        name: the name of its weight in the model.
        spec: the quantizer, with a seed of the layer's own.
        outlier_columns: input dimensions that stay as they are, or None.
        input_scales: numbers that inputs are divided by before they are quantized, and multiplied by afterwards, or
            None.
        basis: what the input is turned by before it is quantized, or None.
    """

    def __init__(self, layer: nn.Module, name: str, spec: QuantSpec, basis: Basis | None = None) -> None:
        self.layer, self.name, self.spec, self.basis = layer, name, with_own_seed(spec, name), basis
        self.outlier_columns: Tensor | None = None
        self.input_scales: Tensor | None = None

    @property
    def sees_whole_input(self) -> bool:
        """Whether tokens share a scale, or their places decide their random numbers."""
        return sees_whole_tensor(self.spec)

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the layer's output for the quantized input."""
        result: Tensor = self.before(round_straight(x, self.round, f"{_ROLE}: the input of {self.name}"))
        return result

    def round(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return the input as it is multiplied."""
        values, kept = x.detach(), self.outlier_columns
        if self.basis is not None:
            values = self.basis.turn_inputs(values)
        if kept is not None:
            values = values.index_fill(-1, kept, 0.0)
        if self.input_scales is not None:
            values = values.float() / self.input_scales.float()
        values = fake_quantize(values, self.spec)
        if self.input_scales is not None:
            values = values * self.input_scales.float()
        if kept is not None:
            values[..., kept] = x.detach()[..., kept].to(values.dtype)
        return (values if self.basis is None else self.basis.turn_inputs_back(values)).to(x.dtype)


def make_quantized_inputs(
    model: nn.Module, names: Iterable[str], spec: ActivationConfig, find_basis: FindBasis
) -> list[QuantizedInput]:
    """Return the forwards of the linear layers whose inputs are to be quantized. Nothing is changed.

    Args:
        model: the model.
        names: names of the weights that are quantized, or would be if weights were. An embedding among them has no
            product, and is left out.
        spec: the quantizer, and what it leaves out.
        find_basis: what products are turned by, see kbit.layers.run_time.residual.find_bases.

    Raises:
        ValueError: nothing is left, exclude finds nothing, or a layer cannot have such inputs: names it.
    """
    products = [name for name in names if not isinstance(owner_of(model, name), nn.Embedding)]
    kept = [name for name in products if spec.exclude is None or re.search(spec.exclude, name) is None]
    if spec.exclude is not None and len(kept) == len(products):
        raise ValueError(f"{_ROLE}.exclude={spec.exclude!r} finds none of the {len(products)} quantized weights")
    if not kept:
        raise ValueError(f"{_ROLE}: there is no product of a quantized weight whose inputs could be quantized")
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    for name in kept:
        _check_layer(model, name, spec, get_head())
    layers = ((name, owner_of(model, name)) for name in kept)
    return [QuantizedInput(layer, name, spec, find_basis(name, _count_inputs(layer))) for name, layer in layers]


def _count_inputs(layer: nn.Module) -> int:
    return as_matrix(cast(Tensor, layer.weight), layer).shape[-1]


def _check_layer(model: nn.Module, name: str, spec: QuantSpec, head: nn.Module | None) -> None:
    """Raise ValueError unless the inputs of a weight's product can be quantized."""
    layer = owner_of(model, name)
    advice = "leave it out by quant.activations.exclude"
    if layer is head:
        raise ValueError(f"{_ROLE}: {name} is the output embedding, whose product is computed in slices: {advice}")
    if not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(
            f"{_ROLE}: {name} is of {type(layer).__name__}, which is no linear layer and computes its products itself: "
            + advice
        )
    inputs = _count_inputs(layer)
    check_blocks(_ROLE, spec, inputs, f"the output of {name} is summed over {inputs} inputs")
