"""Models that are packed while they are loaded, in each dtype, with their own tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kbit.checkpoints.loading import load_model, pack_loaded, pack_model
from kbit.checkpoints.packing import compute_exactly, hash_values, round_rest
from kbit.checkpoints.saving import save_packed
from kbit.experiments.config import Experiment
from kbit.experiments.requirements import check_not_packed
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.catalog import locate_model
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model as load_plain
from kbit.models.parameters import hash_weights

TOKENS = torch.arange(40).view(2, 20)
SMALL = CalibrationConfig(samples=4, length=32)


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Any], tokenizer: Any) -> Path:
    """A float32 checkpoint, whose weights are no 16-bit numbers."""
    folder = tmp_path_factory.mktemp("float32")
    model = build_tiny("llama", vocab_size=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert model.dtype == torch.float32
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(bits=4, include="embed|proj|lm_head"),
        QuantConfig(bits=3, outlier_fraction=0.05),
        QuantConfig(bits=3, method="gptq", calibration=SMALL),
    ],
    ids=lambda quant: quant.label(),
)
def test_a_float32_checkpoint_is_packed_to_the_plain_paths_weights(
    checkpoint: Path, dtype: str, quant: QuantConfig
) -> None:
    fake = load_plain(str(checkpoint), dtype=dtype)
    quantize_model(fake.model, quant, fake.tokenizer)
    packed = load_model(str(checkpoint), dtype=dtype, packed_as=quant)
    assert packed.checkpoint_dtype == fake.checkpoint_dtype == "float16"
    assert hash_values(packed.model) == hash_weights(fake.model)
    compute_exactly(packed.model)
    assert torch.equal(compute(packed.model), compute(fake.model))
    assert compute(packed.model).dtype == getattr(torch, dtype)


def test_calibration_takes_the_tokenizer_that_is_asked_for(checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The folder has no tokenizer of its own."""
    for path in checkpoint.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    quant = QuantConfig(bits=3, method="gptq", calibration=SMALL)
    fake = load_plain(str(tmp_path), tokenizer=str(checkpoint))
    quantize_model(fake.model, quant, fake.tokenizer)
    packed = load_model(str(tmp_path), tokenizer=str(checkpoint), packed_as=quant)
    assert hash_values(packed.model) == hash_weights(fake.model)


@pytest.mark.parametrize(("architecture", "include"), [("llama", "embed|lm_head"), ("mixtral", None), ("gpt2", "wte")])
def test_packed_parts_compute_in_the_dtype_that_transformers_is_asked_for(
    architecture: str, include: str | None, tmp_path: Path, build_tiny: Callable[..., Any]
) -> None:
    """The weights were packed as float32, in which they are decoded before they are cast."""
    model = build_tiny(architecture, vocab_size=1024)
    pack_model(model, QuantConfig(bits=4, include=include))
    model.save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        plain = copy.deepcopy(again)
        plain.dequantize()
        round_rest(plain, expected)  # no buffers, such as rotary frequencies
        compute_exactly(again)
        assert compute(again).dtype == expected
        assert torch.equal(compute(again), compute(plain))
    there = again.to(torch.bfloat16)
    assert compute(there).dtype == torch.bfloat16


def test_a_packed_embedding_is_saved_in_16_bits_and_used_so(tmp_path: Path, tokenizer: Any) -> None:
    loaded = load_plain("nano-gpt2-98k")
    pack_loaded(loaded, QuantConfig(bits=8, include="wte"))
    assert compute(loaded.model).dtype == torch.float16
    loaded.model.save_pretrained(tmp_path)
    assert compute(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")).dtype == torch.float16


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of nano-neox-98k."""
    loaded, folder = load_plain("nano-neox-98k"), tmp_path_factory.mktemp("packed")
    pack_loaded(loaded, QuantConfig(bits=4))
    save_packed(loaded.model, loaded.tokenizer, folder)
    return folder


def test_a_folder_that_is_called_as_a_short_name_is_not_looked_at(
    packed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nano-neox-98k").symlink_to(packed_folder)
    monkeypatch.chdir(tmp_path)
    assert load_model("nano-neox-98k").checkpoint_quantization == ""
    check_not_packed([Experiment(ModelConfig("nano-neox-98k"))])
    assert load_model("./nano-neox-98k").checkpoint_quantization == "kbit nf4"
    with pytest.raises(ValueError, match="is packed by kbit already"):
        check_not_packed([Experiment(ModelConfig("./nano-neox-98k"))])


def test_a_packed_checkpoint_of_the_hub_is_known_by_its_cached_configuration(
    packed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models--someone--packed"
    (place / "refs").mkdir(parents=True)
    (place / "snapshots").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).symlink_to(packed_folder)
    other = tmp_path / "models--someone--plain" / "snapshots" / ("1" * 40)
    other.parent.mkdir(parents=True)
    other.symlink_to(locate_model("nano-neox-98k"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_model("someone/plain", revision="1" * 40).revision == "1" * 40
    loaded = load_model("someone/packed")
    assert (loaded.checkpoint_quantization, loaded.revision) == ("kbit nf4", "0" * 40)
    assert hash_values(loaded.model) == hash_values(load_model(str(packed_folder)).model)
    with pytest.raises(ValueError, match="is packed by kbit already"):
        check_not_packed([Experiment(ModelConfig("someone/packed"))])
