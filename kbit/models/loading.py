"""Load a language model with its tokenizer, and check its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kbit.checks import check_choice
from kbit.lean_private import loaded_lean
from kbit.models.adapters import merge_adapter
from kbit.models.catalog import locate_model, locate_tokenizer
from kbit.models.checkpoint_files import QuantizedError, check_configuration, check_folder, check_model, is_harmless
from kbit.models.config import DTYPES
from kbit.models.device_map import spread_model
from kbit.models.parameters import check_finite, count_embedded
from kbit.models.size import find_cached_folder, find_commit
from kbit.models.transformers_private import describe_gguf
from kbit.silence import silence_libraries


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be quantized and evaluated.

    Attributes:
        model: the model in evaluation mode, on the asked device and in the asked dtype.
        tokenizer: the tokenizer of the same checkpoint, or the one asked for.
        checkpoint_dtype: the 16-bit dtype that the weights were rounded to before they were cast to the asked dtype.
        revision: the sha256 of a local model's files, or the hub's commit.
        checkpoint_quantization: how the checkpoint was quantized before it was made plain again ("gguf Q4_0 Q6_K").
            It is empty for a plain checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint_dtype: str
    revision: str
    checkpoint_quantization: str = ""


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    gpus: int = 1,
    revision: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    gguf_file: str | None = None,
) -> LoadedModel:
    """Load a model by short name, local folder or hub id, from safetensors or GGUF only and without remote code.

    The weights are first rounded to 16 bits, since the baseline of every curve is the 16-bit model: to the checkpoint's
    dtype if it has 16 bits, to float16 if it is float32. Then they are cast to dtype.

    Args:
        name: a short name (see `kbit models`), a local folder or a hub id.
        dtype: float32, bfloat16 or float16, in which the model computes.
        device: cpu, cuda or cuda:N.
        gpus: the number of GPUs of a model that is spread over several (kbit.models.device_map).
        revision: a branch, tag or commit of a hub id. None takes the newest.
        tokenizer: a folder, hub id or short name whose tokenizer is used. None takes the model's own.
        adapter: a folder or hub id of a PEFT adapter, merged into the weights before they are rounded.
        gguf_file: a GGUF file's name in the folder. None takes the only one of a folder without safetensors.

    Raises:
        ValueError: the name or dtype is unknown, weights are not finite or quantized, the tokenizer is of another
            model, or see merge_adapter.
        OSError: files are missing, truncated or cannot be downloaded. The message names the model.
    """
    check_choice("model.dtype", dtype, DTYPES)
    check_device(device)
    silence_libraries()
    source = find_source(name, revision, gguf_file)
    model, found = _read_model(source)
    rounded = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    if adapter is not None:
        model = merge_adapter(model, adapter)
    module: nn.Module = model  # whose .to() transformers wraps in a way that type checkers misread
    _round_weights(module, rounded, getattr(torch, dtype))
    module.eval()
    if gpus > 1:
        spread_model(model, gpus)
    else:
        module.to(device=device)
    check_finite(model)  # a float32 weight beyond 65504 is infinite as float16
    quantization = "" if source.gguf is None else describe_gguf(source.gguf)
    checkpoint_dtype = str(rounded).removeprefix("torch.")
    return LoadedModel(model, read_tokenizer(source, tokenizer, model), checkpoint_dtype, found, quantization)


def _round_weights(model: nn.Module, checkpoint_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Round a model's weights, which must be finite, to 16 bits, and cast them to the dtype in which it computes."""
    check_finite(model)
    for parameter in model.parameters():  # and no buffer: rotary frequencies stay float32, as in transformers
        parameter.data = parameter.data.to(checkpoint_dtype).to(dtype)


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        name: the model as the user named it.
        location: a folder or a hub id.
        revision: a branch, tag or commit of the hub. None: the newest.
        gguf: the GGUF file in the folder. None: safetensors.
    """

    name: str
    location: str
    revision: str | None
    gguf: Path | None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that every part of a checkpoint is loaded with."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf.name}
        return {"trust_remote_code": False, "revision": self.revision or "main"} | gguf

    @property
    def where(self) -> str:
        """The location in words."""
        here = Path(self.location).is_dir()
        return self.location if here else f"{self.location} on the hub (there is no such folder here)"


def find_source(name: str, revision: str | None = None, gguf_file: str | None = None) -> Source:
    """Return where a model is read from.

    Raises:
        ValueError, FileNotFoundError: see check_model.
    """
    gguf = check_model(name, revision, gguf_file)
    return Source(name, locate_model(name), revision, gguf)


def _read_model(source: Source) -> tuple[PreTrainedModel, str]:
    """Return a checkpoint's model and what names its version.

    Raises:
        ValueError: its weights are quantized, or not all of them belong to the model.
        OSError: it cannot be loaded, or lacks weights.
    """
    name, location = source.name, source.location
    try:
        config = AutoConfig.from_pretrained(location, **source.options)
        check_configuration(config.to_dict(), source.where)
        with loaded_lean():
            loading: Any = AutoModelForCausalLM.from_pretrained(
                location, dtype="auto", use_safetensors=True, output_loading_info=True, **source.options
            )
    except QuantizedError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers each raise errors of their own types here
        hint = "; pip install 'kbit[gguf]'" if source.gguf is not None and "gguf" in str(error).lower() else ""
        raise OSError(f"model {name!r} cannot be loaded from {source.where}: {error}{hint}") from error
    model, info = loading
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise OSError(f"model {name!r} at {location} lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(key for key in info["unexpected_keys"] if not is_harmless(key)):
        raise ValueError(
            f"model {name!r} at {location} has {len(unknown)} tensors that the model does not take, such as "
            f"{unknown[0]}: its weights are quantized, or are another model's"
        )
    is_local = Path(location).is_dir()  # then its files were looked at before
    if not is_local and (folder := find_cached_folder(location, source.revision)) is not None:
        check_folder(folder)
    if odd := [key for key, value in model.named_parameters() if not value.is_floating_point()]:
        raise ValueError(f"model {name!r} at {location}: the parameter {odd[0]} holds no floating-point numbers")
    return model, identify_files(source)


def read_tokenizer(source: Source, asked: str | None, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, or another one.

    Raises:
        ValueError: its ids go beyond the model's embedding.
        OSError: there is none.
    """
    where, options = (source.location, source.options) if asked is None else (locate_tokenizer(asked), {})
    if (Path(where) / "tokenizer.json").is_file():  # beside a GGUF file, which has a tokenizer of its own
        options.pop("gguf_file", None)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # see _read_model
        raise OSError(f"the tokenizer of model {source.name!r} cannot be loaded from {where}: {error}") from error
    if not tokenizer("a b")["input_ids"]:  # transformers makes an empty one of a folder without tokenizer files
        raise OSError(f"model {source.name!r} at {where} has no usable tokenizer: its tokenizer files are missing")
    rows = count_embedded(model)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer at {where} has {tokenizer.vocab_size} tokens, and the embedding of model {source.name!r} "
            f"has {rows} rows: it is another model's tokenizer"
        )
    return tokenizer


def check_device(device: str) -> None:
    """Raise ValueError if the device is not there, as kbit never falls back to another one."""
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and torch.cuda.device_count() <= index:
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices here; use device=cpu")


def identify_files(source: Source) -> str:
    """Return what identifies the files that a model was read from: a folder's hash, or the commit of the hub.

    Raises:
        FileNotFoundError: the hub's model is not in the cache.
    """
    folder = Path(source.location)
    return hash_folder(folder, source.gguf) if folder.is_dir() else find_commit(source.location, source.revision)


def hash_folder(folder: Path, gguf: Path | None = None) -> str:
    """Return the sha256 over a local model's configuration, tokenizer and weight files.

    Args:
        folder: the model's folder.
        gguf: the GGUF file that the model is read from, if it is one. Others in the folder do not count.
    """
    digest = hashlib.sha256()
    others = (path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
    for path in sorted([*others, *([] if gguf is None else [gguf])]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
