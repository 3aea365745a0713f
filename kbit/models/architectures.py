"""Which weights make the inputs of which: the "previous layer" of every matrix of a transformer, by architecture.

An input dimension of a matrix is a hidden unit, and its incoming weights are those that are summed into it:

    attention's output  The unit's row of the values. Unit (head, d) is a mean of row (head, d) of V over positions, and
                        with grouped-query attention several heads share a row.
    inner unit          The unit's row of the feed-forward layer's first matrix, and of its gate if there is one.
    residual stream     The unit's row of the matrix whose output was last added to the stream. Before a feed-forward
                        layer that is the attention output, before the next decoder layer the feed-forward output.
                        Where both are added at once (parallel residuals: GPT-NeoX, Phi) it is both. Before the first
                        decoder layer it is the unit's column of the token embedding, or its row of the matrix that
                        projects the embedding (OPT-350M).

Norms between them are left out, as the k-bit paper (section 3, eq. 2) takes the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.models.parameters import as_matrix, count_embedded, owner_of

_ROWS_AT_ONCE: Final = 256  # so many rows are squared at once: 4 MiB of 4,096 float32 columns
# A function from a configuration to the row of the values for each unit of attention's output. None: each has its own.
_Rows = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Source:
    """A weight that is summed into units. Row rows[u] of the matrix [out, in] goes into unit u, without rows row u."""

    name: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class _Architecture:
    """The names of a decoder layer's matrices.

    Attributes:
        layers: the list of decoder layers, below the base model.
        attention_in: the matrices of attention that read the residual stream. The last one holds the values.
        value_rows: where in that matrix the values are.
        attention_out: the matrix that reads what attention returns.
        feed_forward_in: the matrices of the feed-forward layer that read the residual stream. If there are two, one is
            the gate of the other.
        feed_forward_out: the matrix that reads the inner units.
        parallel: whether attention and feed-forward layer read the same residual stream and are added at once.
    """

    layers: str
    attention_in: tuple[str, ...]
    value_rows: _Rows
    attention_out: str
    feed_forward_in: tuple[str, ...]
    feed_forward_out: str
    parallel: bool = False


@dataclass(frozen=True)
class DecoderLayer:
    """Where a decoder layer reads the residual stream and where it writes to the stream.

    Attributes:
        attention, feed_forward: full names of the modules that read the residual stream. Those of one field have the
            same input.
        attention_out, feed_forward_out: full names of the modules that write to the residual stream.
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    attention_out: str
    feed_forward_out: str


def _rows_of_interleaved(config: Any) -> Tensor:
    """Rows are [head][query, key, value][d]."""
    size = int(config.hidden_size // config.num_attention_heads)
    return (torch.arange(config.num_attention_heads)[:, None] * 3 * size + 2 * size + torch.arange(size)).flatten()


def _rows_of_thirds(config: Any) -> Tensor:
    """Rows are [query, key, value][head][d]."""
    size = int(config.hidden_size)
    return 2 * size + torch.arange(size)


def _rows_of_groups(config: Any) -> Tensor | None:
    """Rows are [group][d]. With grouped-query attention a group serves several heads, else one."""
    heads = int(config.num_attention_heads)
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    if groups == heads:
        return None
    group_of_head = torch.arange(heads) // (heads // groups)
    return (group_of_head[:, None] * size + torch.arange(size)).flatten()


_SEPARATE: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP: Final = (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
_GATED: Final = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_LLAMA: Final = _Architecture("layers", _SEPARATE, _rows_of_groups, "self_attn.o_proj", *_GATED)

_ARCHITECTURES: Final = {
    "gpt_neox": _Architecture(
        "layers", ("attention.query_key_value",), _rows_of_interleaved, "attention.dense", *_MLP, parallel=True
    ),
    "bloom": _Architecture(
        "h", ("self_attention.query_key_value",), _rows_of_interleaved, "self_attention.dense", *_MLP
    ),
    "gpt2": _Architecture("h", ("attn.c_attn",), _rows_of_thirds, "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": _Architecture("decoder.layers", _SEPARATE, _rows_of_groups, "self_attn.out_proj", ("fc1",), "fc2"),
    "phi": _Architecture(
        "layers", _SEPARATE, _rows_of_groups, "self_attn.dense", ("mlp.fc1",), "mlp.fc2", parallel=True
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2"), _LLAMA),
}


def list_decoder_layers(model: Any) -> list[DecoderLayer]:
    """Return the decoder layers of a model.

    Raises:
        ValueError: the model's architecture is not known here.
    """
    architecture = _find_architecture(model)
    path = f"{model.base_model_prefix}.{architecture.layers}"
    return [
        DecoderLayer(
            tuple(f"{path}.{i}.{name}" for name in architecture.attention_in),
            tuple(f"{path}.{i}.{name}" for name in architecture.feed_forward_in),
            f"{path}.{i}.{architecture.attention_out}",
            f"{path}.{i}.{architecture.feed_forward_out}",
        )
        for i in range(len(model.get_submodule(path)))
    ]


def find_sources(model: Any) -> dict[str, list[Source]]:
    """Return for the weight of each matrix what is summed into its input units. The module says by which rule.

    Raises:
        ValueError: the model's architecture is not known here.
    """
    architecture = _find_architecture(model)
    # The model type gpt_neox has both kinds of residuals, and its configuration tells which.
    is_parallel = getattr(model.config, "use_parallel_residual", architecture.parallel)
    value_rows = architecture.value_rows(model.config)
    sources: dict[str, list[Source]] = {}
    stream = [Source(_find_input(model))]
    for layer in list_decoder_layers(model):
        attended, fed = Source(f"{layer.attention_out}.weight"), Source(f"{layer.feed_forward_out}.weight")
        sources |= {f"{name}.weight": stream for name in layer.attention}
        sources[attended.name] = [Source(f"{layer.attention[-1]}.weight", value_rows)]
        stream = stream if is_parallel else [attended]
        sources |= {f"{name}.weight": stream for name in layer.feed_forward}
        sources[fed.name] = [Source(f"{name}.weight") for name in layer.feed_forward]
        stream = [attended, fed] if is_parallel else [fed]
    return sources | dict.fromkeys(_find_readers_after(model), stream)


def orient(model: nn.Module, name: str) -> Tensor:
    """Return a view of a matrix as [..., units made, inputs read], and of an embedding as [hidden units, tokens]."""
    weight, owner = model.get_parameter(name).detach(), owner_of(model, name)
    return weight.T if isinstance(owner, nn.Embedding) else as_matrix(weight, owner)


def measure_deviation(model: nn.Module, sources: list[Source]) -> Tensor:
    """Return the standard deviation of each unit's incoming weights, float32 [units]."""
    rows = []
    for source in sources:
        weight = orient(model, source.name)
        rows.append(weight if source.rows is None else weight[source.rows.to(weight.device)])
    return deviation_of(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), dim=1)


def deviation_of(values: Tensor, dim: int) -> Tensor:
    """Return the standard deviation (of the population) along a dimension, in float32.

    The mean of weights is small beside their deviation, so that sqrt(E[x^2] - E[x]^2) loses nothing that matters. It is
    10 to 40 times as fast as torch.std. Where values along the dimension do not lie side by side, torch's norm is as
    slow as torch.std, and squares of a few rows at a time, which stay in the caches, are not.
    """
    values, count = values.float(), values.shape[dim]
    if values.stride(dim) == 1:
        squares, sums = torch.linalg.vector_norm(values, dim=dim).square(), values.sum(dim)
    else:
        parts = torch.split(values, _ROWS_AT_ONCE, dim)
        squares = torch.stack([part.square().sum(dim) for part in parts]).sum(0)
        sums = torch.stack([part.sum(dim) for part in parts]).sum(0)
    variance: Tensor = squares / count - (sums / count).square()
    return variance.clamp_min(0).sqrt()


def _find_architecture(model: Any) -> _Architecture:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"what makes the inputs of {type(model).__name__} (model_type {model_type!r}) is not known; "
            f"it is of: {', '.join(sorted(_ARCHITECTURES))}"
        )
    return _ARCHITECTURES[model_type]


def _find_input(model: Any) -> str:
    """Return the name of the weight that makes the residual stream of the first decoder layer."""
    path: str = model.base_model_prefix
    if getattr(getattr(model.base_model, "decoder", None), "project_in", None) is not None:
        return f"{path}.decoder.project_in.weight"
    embedding = model.get_input_embeddings().weight
    return next(str(name) for name, parameter in model.named_parameters() if parameter is embedding)


def _find_readers_after(model: Any) -> list[str]:
    """Return the names of the weight that reads the residual stream after the last decoder layer."""
    if getattr(getattr(model.base_model, "decoder", None), "project_out", None) is not None:
        return [f"{model.base_model_prefix}.decoder.project_out.weight"]
    head = model.get_output_embeddings().weight
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head]


def check_ids(model: Any, tokenizer: Any, largest: int) -> None:
    """Raise ValueError if a text's largest token id is beyond the model's embedding, such as that of an added token."""
    rows = count_embedded(model)
    if largest >= rows:
        raise ValueError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(largest)!r} of id {largest}, and the model's "
            f"embedding has {rows} rows: the tokenizer of {tokenizer.name_or_path} has tokens that the model lacks"
        )
