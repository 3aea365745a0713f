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
from kbit.models.catalog import locate_model
from kbit.models.config import DTYPES
from kbit.models.device_map import spread_model
from kbit.models.parameters import check_finite
from kbit.models.transformers_private import find_commit
from kbit.silence import silence_libraries


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be quantized and evaluated.

    Attributes:
        model: the model in evaluation mode, on the asked device and in the asked dtype.
        tokenizer: the tokenizer of the same checkpoint.
        checkpoint_dtype: the 16-bit dtype that the weights were rounded to before they were cast to the asked dtype.
        revision: the sha256 of a local model's files, or the hub's commit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint_dtype: str
    revision: str


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu", gpus: int = 1) -> LoadedModel:
    """Load a model by short name, local folder or hub id, from safetensors only and without remote code.

    The weights are first rounded to 16 bits, since the baseline of every curve is the 16-bit model: to the checkpoint's
    dtype if it has 16 bits, to float16 if it is float32. Then they are cast to dtype, in which the model computes. With
    device cuda and gpus > 1 the decoder layers are spread over so many GPUs (kbit.models.device_map).

    Raises:
        ValueError: the name or dtype is unknown, or weights are not finite.
        OSError: files are missing, truncated or cannot be downloaded. The message names the model.
    """
    check_choice("model.dtype", dtype, DTYPES)
    check_device(device)
    silence_libraries()
    location = locate_model(name)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # safetensors, tokenizers and transformers each raise errors of their own types here
        where = location if Path(location).is_dir() else f"{location} on the hub (there is no such folder here)"
        raise OSError(f"model {name!r} cannot be loaded from {where}: {error}") from error
    model, info = loading
    if not tokenizer("a b")["input_ids"]:  # transformers makes an empty one of a folder without tokenizer files
        raise OSError(f"model {name!r} at {location} has no usable tokenizer: its tokenizer files are missing")
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise OSError(f"model {name!r} at {location} lacks {len(missing)} tensors, such as {missing[0]}")
    checkpoint_dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
    check_finite(model)
    module: nn.Module = model  # whose .to() transformers wraps in a way that type checkers misread
    for parameter in module.parameters():  # and no buffer: rotary frequencies stay float32, as in transformers
        parameter.data = parameter.data.to(checkpoint_dtype).to(getattr(torch, dtype))
    module.eval()
    if gpus > 1:
        spread_model(model, gpus)
    else:
        module.to(device=device)
    check_finite(model)  # a float32 weight beyond 65504 is infinite as float16
    revision = hash_folder(Path(location)) if Path(location).is_dir() else find_commit(config)
    return LoadedModel(model, tokenizer, str(checkpoint_dtype).removeprefix("torch."), revision)


def check_device(device: str) -> None:
    """Raise ValueError if the device is not there, as kbit never falls back to another one."""
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and torch.cuda.device_count() <= index:
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices here; use device=cpu")


def hash_folder(folder: Path) -> str:
    """Return the sha256 over a local model's configuration, tokenizer and weight files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors"}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
