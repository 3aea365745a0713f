"""Linear layers of a model that compute in int8: which, and what they did (kbit.layers.int8_linear)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.int8_linear import Int8Linear, list_products, quantize_int8
from kbit.layers.int8_schemes import Scheme
from kbit.methods.config import QuantConfig
from kbit.methods.weight import Codes, Job, Weight
from kbit.models.parameters import owner_of


def quantize_products(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Let the layers compute in int8, and yield each weight with its codes.

    Raises:
        ValueError: a weight that is no linear layer's, or the output embedding's, whose product kbit's scorer computes
            in slices of its own: names it. Nothing is changed then.
    """
    for weight in job.weights:
        _check_owner(job.model, weight, job.quant.method)
    for weight in job.weights:
        owner = owner_of(job.model, weight.name)
        product = make_product(weight, cast(Tensor | None, owner.bias), job.quant)
        product.install(owner)
        yield weight, product.weight


def _check_owner(model: nn.Module, weight: Weight, method: str) -> None:
    """Raise ValueError unless the weight is a linear layer's, and not the output embedding's."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    owner, head = owner_of(model, weight.name), get_head()
    if not isinstance(owner, nn.Linear | Conv1D) or owner is head or weight.values.ndim < 2:
        kind = "vector" if weight.values.ndim < 2 else "weight"
        what = "the output embedding" if owner is head else f"a {kind} of {type(owner).__name__}"
        raise ValueError(
            f"quant.method={method} computes linear layers of the blocks in int8: {weight.name} is {what}; "
            "leave it out by quant.exclude, or take another method"
        )


def make_product(weight: Weight, bias: Tensor | None, quant: QuantConfig) -> Int8Linear:
    """Return the int8 product of a linear layer's weight, which stays as it is."""
    scheme = cast(Scheme, quant.scheme)  # each method that comes here has one
    with weight.outliers_at_zero() as values:
        matrix = quantize_int8(values, by_row=scheme.weight_rows, zero_point=scheme.zero_point)
    return Int8Linear(matrix, weight.values, bias, scheme, quant.activation_threshold, weight.outlier_columns)


def describe_products(model: nn.Module) -> dict[str, Any]:
    """Return the share of the input dimensions that was multiplied at 16 bits in any call so far.

    The share is of all layers' dimensions together. 16-bit copies of these columns would cost 8 * decomposed_share bits
    per parameter, which total_bits leaves out, as the paper does. The result is empty if no layer decomposes.
    """
    met = {name: product.met for name, product in list_products(model) if product.scheme.decomposes}
    if not met:
        return {}
    counts = {name: int(dimensions.sum()) for name, dimensions in met.items()}
    most = max(counts, key=lambda name: counts[name])
    return {
        "decomposed_share": sum(counts.values()) / sum(len(dimensions) for dimensions in met.values()),
        "decomposed_most": {"module": most, "dimensions": counts[most], "of": len(met[most])},
    }
