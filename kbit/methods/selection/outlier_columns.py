"""Which input dimensions of a matrix stay at 16 bits: outlier-dependent quantization.

proxy   The units whose incoming weights (kbit.models.architectures) have the largest standard deviation: hidden units
        with outliers have deviations up to 20 times those of others, and weights, unlike activations, need no data
        (Dettmers & Zettlemoyer 2023, "The case for 4-bit precision", section 3, eq. 2).
column  The matrix' own columns with the largest standard deviation: what bitsandbytes' tracer of outliers does. Needs
        no knowledge of the architecture.
random  As many dimensions at random: what the bits alone gain.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from kbit.methods.config import QuantConfig
from kbit.models.architectures import deviation_of, find_sources, measure_deviation
from kbit.models.parameters import label_matrix, owner_of, split_matrices


def choose_outliers(
    model: nn.Module, names: Sequence[str], config: QuantConfig
) -> dict[str, list[Int64[Tensor, " outliers"]]]:
    """Return for each weight the input dimensions that stay at 16 bits, in rising order, before anything is changed.

    There is one list of them for each matrix of the parameter: one, or as many as fused experts. They are places in the
    last dimension of the matrix as it is quantized (kbit.models.parameters.split_matrices). Those of an embedding are
    hidden units. A vector, such as an included bias, has none and is left out.

    Args:
        model: the model with its 16-bit weights.
        names: names of the weights to quantize.
        config: the configuration, whose outlier fields decide.

    Raises:
        ValueError: a weight whose inputs come from weights that are not known, with proxy. The message names it.
    """
    if not config.keeps_outliers:
        return {}
    weights = {name: split_matrices(model.get_parameter(name).detach(), owner_of(model, name)) for name in names}
    weights = {name: matrices for name, matrices in weights.items() if matrices[0].ndim >= 2}
    if config.outlier_selection == "proxy":
        sources = _measure_sources(model, list(weights))
        deviations = {name: [sources[name]] * len(matrices) for name, matrices in weights.items()}
    elif config.outlier_selection == "column":
        deviations = {name: [_measure_columns(matrix) for matrix in matrices] for name, matrices in weights.items()}
    else:
        deviations = {name: _draw_all(model, name, matrices, config.seed) for name, matrices in weights.items()}
    return {name: [_select(values, config) for values in of_matrices] for name, of_matrices in deviations.items()}


def _measure_sources(model: nn.Module, names: Sequence[str]) -> dict[str, Float32[Tensor, " in"]]:
    """Return the standard deviation of the weights into each input unit of each weight."""
    advice = "quant.outlier_selection=column does without, or quant.exclude leaves it out"
    try:
        sources = find_sources(model)
    except ValueError as error:
        raise ValueError(f"outliers by proxy, {names[0]}: {error}. {advice}") from None
    if unknown := [name for name in names if name not in sources]:
        raise ValueError(f"outliers by proxy: what makes the inputs of {unknown[0]} is not known; {advice}")
    measured: dict[int, Tensor] = {}  # queries, keys and values share their sources
    for name in names:
        if id(sources[name]) not in measured:
            measured[id(sources[name])] = measure_deviation(model, sources[name])
    return {name: measured[id(sources[name])] for name in names}


def _measure_columns(weight: Tensor) -> Float32[Tensor, " in"]:
    """Return the standard deviation of each column."""
    return deviation_of(weight.flatten(0, -2), dim=0)


def _draw_all(model: nn.Module, name: str, matrices: Sequence[Tensor], seed: int) -> list[Float32[Tensor, " in"]]:
    are_experts = matrices[0].ndim < model.get_parameter(name).ndim
    labels = [label_matrix(name, number if are_experts else None) for number in range(len(matrices))]
    return [_draw(label, matrix, seed) for label, matrix in zip(labels, matrices, strict=True)]


def _draw(name: str, weight: Tensor, seed: int) -> Float32[Tensor, " in"]:
    """Return random numbers of the weight's own, one for each input dimension."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.rand(weight.shape[-1], generator=generator).to(weight.device)


def _select(values: Float32[Tensor, " in"], config: QuantConfig) -> Int64[Tensor, " outliers"]:
    """Return the dimensions of the largest values, the first ones among equals."""
    if config.outlier_zscore is not None:
        # the spread of one value or of equal ones is 0: nothing stands out of it
        z = (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)
        return (z > config.outlier_zscore).nonzero().flatten()
    order = torch.sort(values, descending=True, stable=True).indices
    return order[: config.count_kept(len(values))].sort().values
