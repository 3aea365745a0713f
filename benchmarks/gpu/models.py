"""Stage 5: whole models: seconds and peak memory of quantize_model on a random Llama of 7b's shape, and of GPTQ."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from card import Card, Report

from kbit import load_model, quantize_model
from kbit.methods.config import CalibrationConfig, QuantConfig

# hidden size, inner size, layers, heads, vocabulary
LLAMA_7B = (4096, 11008, 32, 32, 32000)
LLAMA_TINY = (32, 64, 2, 2, 2048)
QUANTIZERS = {
    "nf4": QuantConfig(4, "nf", block_size=64),
    "int3 centered minmax": QuantConfig(3, "int", block_size=128, normalization="minmax", centering=True),
    "nf4 dq8": QuantConfig(4, "nf", block_size=64, scale_format="dq8"),
}


@dataclass(frozen=True)
class Sizes:
    """The model's shape and dtype, and the calibration of GPTQ."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    calibration: CalibrationConfig


FULL = Sizes(LLAMA_7B, torch.bfloat16, CalibrationConfig(samples=32, length=512))
READY = Sizes(LLAMA_TINY, torch.float32, CalibrationConfig(samples=2, length=16))


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Quantize a new model by each quantizer, then one layer by GPTQ."""
    for name, quant in QUANTIZERS.items():
        report.add(**measure(card, sizes, name, quant))
    hidden, inner, _, heads, vocabulary = sizes.shape
    one = Sizes((hidden, inner, 1, heads, vocabulary), sizes.dtype, sizes.calibration)
    gptq = QuantConfig(4, "int", block_size=128, method="gptq", calibration=sizes.calibration)
    report.add(**measure(card, one, "gptq int4, one layer", gptq))


def measure(card: Card, sizes: Sizes, name: str, quant: QuantConfig) -> dict[str, Any]:
    """Return the seconds and bytes of one quantization. The first one compiles kernels."""
    model = make_llama(sizes.shape, sizes.dtype, card)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenizer = load_model("nano-neox-98k").tokenizer if quant.traits.needs_text else None
    card.reset_peak()
    card.wait()
    start = time.perf_counter()
    report = quantize_model(model, quant, tokenizer)
    card.wait()
    seconds = time.perf_counter() - start
    is_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    is_new = 0 < report.weight_rmse < 1
    wrong = [] if is_finite and is_new else [f"relative error {report.weight_rmse}, finite {is_finite}"]
    return {
        "name": name, "seconds": seconds, "weights_bytes": held, "peak_bytes": card.read_peak(),
        "weight_rmse": report.weight_rmse, "wrong": wrong,
    }  # fmt: skip


def make_llama(shape: tuple[int, int, int, int, int], dtype: torch.dtype, card: Card) -> Any:
    """Return a random Llama, made on the card."""
    hidden, inner, layers, heads, vocabulary = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    return card.make_model(config, dtype)


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each quantization."""
    for row in rows:
        line = f"{row['name']}: {row['seconds']:.2f} s"
        if row["peak_bytes"]:
            line += f", peak {row['peak_bytes'] / 1e9:.2f} GB of which weights {row['weights_bytes'] / 1e9:.2f} GB"
        yield line + (f"; {row['wrong'][0]}" if row["wrong"] else "")
