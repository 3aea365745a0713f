"""Models that are packed while they are loaded, in each dtype, with their own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.checkpoints.loading import load_model
from kbit.checkpoints.packing import compute_exactly, hash_values
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
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
