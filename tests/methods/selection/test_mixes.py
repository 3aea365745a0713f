"""The mixes of conf/quant give each matrix of LLaMA-2 7B what llama.cpp gives it, and other models something else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from kbit.methods.config import QuantConfig
from kbit.methods.report import plan_quantization
from kbit.models.loading import load_model
from kbit.numerics.spec import QuantSpec

# Bits per weight of LLaMA-2 7B: examples/quantize/README.md of llama.cpp, commit ffe88a36.
PUBLISHED = {
    "q2_k": 3.35, "q3_k_s": 3.50, "q3_k_m": 3.91, "q3_k_l": 4.27, "q4_k_s": 4.58, "q4_k_m": 4.84, "q5_k_s": 5.52,
    "q5_k_m": 5.68, "q6_k": 6.56,
}  # fmt: skip
# The same matrices in kbit's own quantizers, as the comments of the files say.
OWN = {
    "q2_k": 3.38, "q3_k_s": 3.56, "q3_k_m": 3.95, "q3_k_l": 4.31, "q4_k_s": 4.58, "q4_k_m": 4.83, "q5_k_s": 5.52,
    "q5_k_m": 5.67, "q6_k": 6.50,
}  # fmt: skip
# A super-block of 256 weights with its scales: block_q2_K of 84 bytes, then 110, 144, 176 and 210. Norms are float32.
FORMATS = {2: 84 * 8 / 256, 3: 110 * 8 / 256, 4: 144 * 8 / 256, 5: 176 * 8 / 256, 6: 210 * 8 / 256}
NORM_BITS = 32


def make_llama(hidden: int, inner: int, layers: int, shared: int = 1) -> Any:
    """A LLaMA-2 without values, of which so many heads share keys and values."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128 // shared, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def llama() -> Any:
    """LLaMA-2 7B."""
    return make_llama(4096, 11008, 32)


def count_published(model: Any, quant: QuantConfig) -> float:
    """Return the bits per weight in llama.cpp's formats, with the bits that this mix gives each matrix."""
    report = plan_quantization(model, quant)
    bits = [FORMATS[quant.follow(t.rule).bits] if t.quantized else NORM_BITS for t in report.tensors]
    total = sum(each * math.prod(tensor.shape) for each, tensor in zip(bits, report.tensors, strict=True))
    return total / report.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mix_has_the_published_bits_in_the_published_formats(name: str, llama: Any) -> None:
    quant = QuantConfig.from_name(f"mix_{name}")
    report = plan_quantization(llama, quant)
    # two decimals, and rounded sizes
    assert count_published(llama, quant) == pytest.approx(PUBLISHED[name], abs=0.0075)
    assert report.total_bits / report.parameters == pytest.approx(OWN[name], abs=0.005)


@pytest.mark.parametrize(
    "model", ["nano-neox-98k", "nano-gpt2-98k", "nano-opt-98k", "nano-bloom-98k", "nano-stories-260k"]
)
def test_every_mix_finds_its_matrices_in_every_architecture(model: str) -> None:
    loaded = load_model(model)
    for name in PUBLISHED:
        quant = QuantConfig.from_name(f"mix_{name}")
        report = plan_quantization(loaded.model, quant)
        assert report.coverage == 1
        head = [t for t in report.tensors if "lm_head" in t.name or "embed_out" in t.name]
        assert [quant.follow(tensor.rule).bits for tensor in head] == [6]


@pytest.mark.parametrize(
    ("shape", "here", "there"),
    [((4096, 11008, 32), 4.844, 4.844), ((5120, 13824, 40), 4.773, 4.834), ((8192, 28672, 80, 8), 4.625, 4.804)],
    ids=["7B", "13B", "70B"],
)
def test_q4_k_m_is_that_of_7b_in_larger_models_too(shape: tuple[int, ...], here: float, there: float) -> None:
    """llama.cpp chooses the first and last eighth of the layers and every third between, and has a rule for 70B."""
    model, quant = make_llama(*shape), QuantConfig.from_name("mix_q4_k_m")
    assert count_published(model, quant) == pytest.approx(here, abs=0.0005)
    layers = model.config.num_hidden_layers

    def choose(name: str) -> int:
        if "lm_head" in name:
            return 6
        if "v_proj" not in name and "down_proj" not in name:
            return 4
        layer = int(name.split(".")[2])
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            return 6
        return 5 if layers == 80 and "v_proj" in name else 4

    named = list(model.named_parameters())
    total = sum(p.numel() * (NORM_BITS if p.ndim == 1 else FORMATS[choose(name)]) for name, p in named)
    assert total / sum(p.numel() for _, p in named) == pytest.approx(there, abs=0.0005)


def test_a_mix_is_no_single_quantizer() -> None:
    with pytest.raises(ValueError, match=r"mix_q4_k_m is a mix of quantizers: QuantConfig\.from_name"):
        QuantSpec.from_name("mix_q4_k_m")
