"""Shapes of models: what of them decides memory. Published ones are in a table, others are built without weights."""

from __future__ import annotations

import csv
import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from kbit.checks import suggest
from kbit.methods.config import QuantConfig
from kbit.models.catalog import STUDIED, locate_model
from kbit.models.size import CONTEXT_FIELDS, find_cached_folder
from kbit.numerics.spec import BASELINE_BITS

CATALOGUE: Final = Path(str(files("kbit"))) / "assets" / "architectures.csv"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide how much memory it takes.

    Attributes:
        name: the model's name.
        parameters: the number of parameters, where tied ones count once.
        layers: the number of decoder layers.
        hidden: the size of the residual stream.
        heads: the number of attention heads.
        cached_values: the keys' and values' numbers that the KV cache holds for a token, in all layers.
        vocabulary: the number of rows of the embedding.
        context: the number of tokens that the model takes at once, or None if its configuration does not say.
        matrices: how many weight matrices in the transformer blocks have each shape [out, in].
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    cached_values: int
    vocabulary: int
    context: int | None
    matrices: Mapping[tuple[int, int], int]

    def count_weight_bits(self, quant: QuantConfig) -> int:
        """Return the bits of all weights: quantized matrices with their scales, everything else at 16 bits.

        Raises:
            ValueError: the quantizer has rules, which need the tensors' names. A shape knows their sizes.
        """
        if quant.rules:
            raise ValueError("quant.rules choose tensors by their names, and the shapes of models have none")
        if quant.allocates:
            raise ValueError("quant.allocation needs the values of weights, and the shapes of models have none")
        if quant.is_baseline:
            return BASELINE_BITS * self.parameters
        rest = self.parameters - sum(math.prod(shape) * count for shape, count in self.matrices.items())
        quantized = sum(quant.count_bits(shape) * count for shape, count in self.matrices.items())
        return BASELINE_BITS * rest + quantized

    def count_adapter_parameters(self, rank: int) -> int:
        """Return the parameters of LoRA adapters of this rank on every weight matrix of the blocks."""
        return sum(rank * (out + inputs) * count for (out, inputs), count in self.matrices.items())


@functools.cache
def read_catalogue() -> dict[str, ModelShape]:
    """Return the shapes of the published models that have a short name."""
    with CATALOGUE.open(newline="") as file:
        return {row["name"]: _read_row(row) for row in csv.DictReader(file)}


def _read_row(row: dict[str, str]) -> ModelShape:
    numbers = {name: int(value) for name, value in row.items() if name not in ("name", "matrices")}
    matrices: dict[tuple[int, int], int] = {}
    for entry in row["matrices"].split():
        count, out, inputs = map(int, entry.split("x"))
        matrices[out, inputs] = count
    return ModelShape(name=row["name"], matrices=matrices, **numbers)


def find_shape(name: str) -> ModelShape:
    """Return the shape of a model: of the table if it is published there, else of its configuration here.

    Args:
        name: a short name or its hub id, a local folder, or the hub id of a model whose configuration is in the hub's
            cache.

    Raises:
        ValueError: the model is neither in the table nor here.
    """
    short = next((model.name for model in STUDIED.values() if model.hub_id == name), name)
    listed = read_catalogue().get(_find_first(short))
    if listed is not None:
        return ModelShape(**{**vars(listed), "name": name})
    place = Path(_locate(name))
    folder = place if place.is_dir() else find_cached_folder(str(place))
    if folder is None:
        raise ValueError(f"the shape of {name!r} is not known here: give a local folder. {suggest(name, STUDIED)}")
    return measure_shape(name, _read_config(folder))


def _locate(name: str) -> str:
    try:
        return locate_model(name)
    except ValueError as error:
        raise ValueError(str(error).replace("model.name=", "--models ", 1)) from None


def _find_first(name: str) -> str:
    """Return the name of the first published model of this shape: bloom-3b for bloomz-3b."""
    if name.startswith("bloomz"):
        return name.replace("bloomz", "bloom", 1)
    return name.removesuffix("-v0") if name.startswith("pythia-") else name


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def measure_shape(name: str, config: Any) -> ModelShape:
    """Return the shape of the model that transformers builds of a configuration. It is built without any weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from kbit.methods.report import plan_quantization
    from kbit.models.parameters import owner_of, split_matrices

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.tie_weights()
    model.eval()
    report = plan_quantization(model, QuantConfig(bits=8))
    matrices: Counter[tuple[int, int]] = Counter()
    for tensor in report.tensors:
        if tensor.quantized:
            parameter = tensor.name.split(" = ")[0]
            for matrix in split_matrices(model.get_parameter(parameter), owner_of(model, parameter)):
                matrices[matrix.shape[-2], matrix.shape[-1]] += 1
    text = config.get_text_config()
    return ModelShape(
        name,
        parameters=report.parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        cached_values=_count_cached(model),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        context=next((value for name in CONTEXT_FIELDS if (value := getattr(text, name, None))), None),
        matrices=dict(matrices),
    )


def _count_cached(model: Any) -> int:
    """Return the numbers that the cache holds after one token, in which heads may share keys and values."""
    import torch

    with torch.no_grad():
        output = model(torch.zeros((1, 1), dtype=torch.long, device="meta"), use_cache=True)
    cache = output["cache" if "cache" in output else "past_key_values"]  # its name in earlier releases
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
