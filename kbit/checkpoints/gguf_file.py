"""Models as GGUF files, which llama.cpp and transformers read: packed weights as blocks, others as 16 or 32 bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbit.checkpoints.formats import gguf as blocks
from kbit.checkpoints.formats.plain import NotExactError
from kbit.checkpoints.packing import list_codes, list_packed
from kbit.models.parameters import as_matrix, owner_of

FILE: Final = "model.gguf"
_NORMAL, _CONTROL = 1, 3  # kinds of tokens


@dataclass(frozen=True)
class Architecture:
    """An architecture as GGUF knows it.

    Attributes:
        name: its name in the file.
        fields: for each of the file's fields the field of the model's configuration.
        heads: for layers whose outputs are reordered, by the end of their name, the field with the number of heads.
    """

    name: str
    fields: Mapping[str, str]
    heads: Mapping[str, str]


_LLAMA: Final = Architecture(
    "llama",
    {
        "add_context_length": "max_position_embeddings",
        "add_embedding_length": "hidden_size",
        "add_block_count": "num_hidden_layers",
        "add_feed_forward_length": "intermediate_size",
        "add_head_count": "num_attention_heads",
        "add_head_count_kv": "num_key_value_heads",
        "add_layer_norm_rms_eps": "rms_norm_eps",
        "add_vocab_size": "vocab_size",
    },
    {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
)
_GPT2: Final = Architecture(
    "gpt2",
    {
        "add_context_length": "n_positions",
        "add_embedding_length": "n_embd",
        "add_block_count": "n_layer",
        "add_feed_forward_length": "n_inner",
        "add_head_count": "n_head",
        "add_layer_norm_eps": "layer_norm_epsilon",
        "add_vocab_size": "vocab_size",
    },
    {},
)
ARCHITECTURES: Final = {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2}  # by the configuration's model_type


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> str:
    """Write OUT/model.gguf and return what was written.

    A tokenizer of byte-level BPE is written into the file. Others are only beside it, as Hugging Face's files.

    Raises:
        NotExactError: the architecture is none of ARCHITECTURES, or no kind of blocks holds a weight exactly.
        ImportError: the package gguf (the extra kbit[gguf]) is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("format=gguf needs the package gguf: pip install 'kbit[gguf]'") from error
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise NotExactError(f"gguf is written of {', '.join(ARCHITECTURES)}, not of {kind}: export to another format")
    architecture, config = ARCHITECTURES[kind], model.config
    number = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[architecture.name]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = list(_list_tensors(model, architecture, lambda name: names.get_name(name, (".weight", ".bias"))))
    if architecture is _LLAMA:
        _check_rotations(config)
    out.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out / FILE, architecture.name)
    for add, field in architecture.fields.items():
        getattr(writer, add)(getattr(config, field) or 4 * config.hidden_size)  # n_inner=None of GPT-2
    if architecture is _LLAMA:
        _add_rotations(writer, config)
    has_tokenizer = _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, data, block_kind in tensors:
        raw = None if block_kind is None else gguf.GGMLQuantizationType(block_kind.number)
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kinds = sorted({block_kind.name for _, _, block_kind in tensors if block_kind is not None})
    return f"gguf {' '.join(kinds)}{'' if has_tokenizer else ' (the file itself has no tokenizer)'}"


def _list_tensors(
    model: PreTrainedModel, architecture: Architecture, rename: Callable[[str], str | None]
) -> Iterator[tuple[str, NDArray[Any], blocks.Kind | None]]:
    """Yield each tensor of the file: its name, its values or blocks, and their kind."""
    codes, packed = list_codes(model), list_packed(model)
    tied = set(model.all_tied_weights_keys)
    inside = {f"{name}.{part}" for name, module in packed.items() for part in module.layout.list_tensors()}
    state = {name: t for name, t in model.state_dict().items() if name not in inside and name not in tied}
    for name in (*codes, *state):
        new = rename(name)
        if new is None:
            raise NotExactError(f"gguf has no name for {name} in the architecture {architecture.name}")
        layer = name.rpartition(".")[0]
        order = next((getattr(model.config, f) for end, f in architecture.heads.items() if layer.endswith(end)), None)
        if name in codes:
            try:
                kind, rows = blocks.write(codes[name])
            except NotExactError as error:
                raise NotExactError(f"{name}: {error}") from error
            yield new, _pair_rotated(rows, order), kind
        else:
            values = as_matrix(state[name], owner_of(model, name)).float().numpy()
            data = values if values.ndim < 2 else values.astype(np.float16)
            if values.ndim == 2 and not np.array_equal(data.astype(np.float32), values):
                data = values  # bfloat16's range
            yield new, np.ascontiguousarray(_pair_rotated(data, order)), None


def _pair_rotated(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Return the rows of a query or key matrix in llama.cpp's order, where rotated dimensions lie in pairs."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _check_rotations(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NotExactError(f"gguf is written of models with plain rotary embeddings, not {rope['rope_type']}")


def _add_rotations(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    """Write a byte-level BPE tokenizer's tokens, one for each row of the embedding, and merges. Return if it is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    splitter = content.get("pre_tokenizer") or {}
    if (content.get("model") or {}).get("type") != "BPE" or splitter.get("type") != "ByteLevel":
        return False
    special = {token["id"] for token in content.get("added_tokens", []) if token["special"]}
    ids = {number: token for token, number in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    count = max(rows, max(ids) + 1)
    writer.add_token_list([ids.get(number, f"[unused{number}]") for number in range(count)])
    writer.add_token_types([_CONTROL if number in special else _NORMAL for number in range(count)])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
    ):
        if number is not None:
            add(number)
    return True
