"""Loading models: complete, in the asked dtype, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kbit.methods.report import plan_quantization
from kbit.models.catalog import EMBEDDED, locate_model
from kbit.models.loading import hash_folder, load_model
from kbit.models.parameters import hash_weights
from kbit.numerics.spec import QuantSpec

Build = Callable[..., Any]

NF4 = QuantSpec(bits=4, data_type="nf", block_size=64)
SHIPPED = sorted(folder.name for folder in EMBEDDED.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_loads_completely_and_computes(name: str) -> None:
    loading: Any = AutoModelForCausalLM.from_pretrained(locate_model(name), output_loading_info=True)
    _, info = loading
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    loaded = load_model(name)
    tokens = loaded.tokenizer("Once upon a time there was", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.model(tokens).logits
    assert torch.isfinite(logits).all()
    assert plan_quantization(loaded.model, NF4).coverage == 1.0


@pytest.mark.parametrize("name", SHIPPED)
def test_the_number_in_a_nano_models_name_counts_its_block_matrices(name: str) -> None:
    loaded = load_model(name)
    report = plan_quantization(loaded.model, NF4)
    unit = {"k": 1e3, "m": 1e6}[name[-1]]
    number = float(name.rpartition("-")[2][:-1])
    counted = report.parameters if "stories" in name else report.quantized_parameters  # 260k counts all parameters
    assert round(counted / unit) in {number, number + 1}  # 995,328 is 1m, 7,372,800 is 7m


def test_weights_are_rounded_to_16_bits_before_the_cast() -> None:
    loaded = load_model("nano-stories-260k")  # a float32 checkpoint
    assert loaded.checkpoint_dtype == "float16"
    for parameter in loaded.model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.half().float())


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_asked_dtype_is_the_one_it_computes_in(dtype: str, expected: torch.dtype) -> None:
    assert {p.dtype for p in load_model("nano-neox-98k", dtype=dtype).model.parameters()} == {expected}


def test_a_local_folder_loads_like_the_short_name(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(EMBEDDED / "nano-neox-98k", folder)
    mine, theirs = load_model(str(folder)), load_model("nano-neox-98k")
    assert hash_weights(mine.model) == hash_weights(theirs.model)
    assert mine.revision == theirs.revision == hash_folder(folder)


def test_an_unknown_short_name_suggests_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'nano-neox-99k'.*did you mean .*nano-neox-98k"):
        load_model("nano-neox-99k")


def test_a_folder_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no_model_here.*nor a folder here"):
        load_model(str(tmp_path / "no_model_here"))


def test_an_unknown_dtype_lists_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.dtype.*int8.*float32.*bfloat16.*float16"):
        load_model("nano-neox-98k", dtype="int8")


def test_a_truncated_weight_file_is_an_os_error_naming_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(EMBEDDED / "nano-neox-98k", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(OSError, match=r"model '.*cut' cannot be loaded"):
        load_model(str(folder))


def test_a_weight_file_that_lacks_a_tensor_is_refused(tmp_path: Path, build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("llama", vocab_size=1024)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(OSError, match=r"layers\.2\."):  # else the third layer would be random
        load_model(str(tmp_path))


def test_rotary_frequencies_stay_float32() -> None:
    loaded = load_model("nano-neox-98k", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED / "nano-neox-98k", dtype=torch.float32)
    buffers = dict(loaded.model.named_buffers())
    assert buffers
    for name, expected in plain.named_buffers():
        assert torch.equal(buffers[name], expected), name
