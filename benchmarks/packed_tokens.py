"""Milliseconds for each generated token at batch 1 on one thread: a packed model against the plain one in 16 bits.

    python benchmarks/packed_tokens.py [--tokens 12] [--rounds 9]

The model has SmolLM2-135M's architecture and random weights, as only time is measured. Its variants take turns in each
round, so that a busy machine slows all alike. In a round each reads a prompt of 8 tokens, which is not timed, and
generates some. Its time is the median of those tokens' processor time, and reported is the median over the rounds, and
its ratios. Writes benchmarks/results/packed_tokens.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Final

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"  # before torch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kbit.checkpoints.loading import pack_model
from kbit.checkpoints.packing import count_stored_bytes
from kbit.kernels.simd import find_isa
from kbit.methods.config import QuantConfig

RECORD: Final = Path(__file__).parent / "results" / "packed_tokens.json"
QUANT: Final = {"packed nf4": None, "packed nf4, head too": "embed_tokens"}
PROMPT: Final = 8


def build(dtype: torch.dtype) -> Any:
    """Return the plain model, the same one at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_all() -> dict[str, Any]:
    """Return each variant by its name. Packed ones compute in bfloat16 beside their codes."""
    models = {"bfloat16": build(torch.bfloat16), "float16": build(torch.float16)}
    for name, include in QUANT.items():
        models[name] = build(torch.bfloat16)
        pack_model(models[name], QuantConfig(bits=4, data_type="nf", include=include))
    return models


@torch.inference_mode()
def time_tokens(model: Any, tokens: int) -> float:
    """Return the median milliseconds of processor time of a generated token."""
    done = model(torch.arange(PROMPT)[None], use_cache=True)
    times = []
    for _ in range(tokens):
        token = done.logits[:, -1:].argmax(-1)
        start = time.process_time()
        done = model(token, past_key_values=done.past_key_values, use_cache=True)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def measure(models: dict[str, Any], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each variant, their ratios to the plain ones of the same round, and its bytes."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            milliseconds = time_tokens(model, tokens)
            if number:  # the first round compiles
                found[name].append(milliseconds)
    rows = {}
    for name, times in found.items():
        rows[name] = {
            "milliseconds": statistics.median(times),
            "least": min(times),
            "bytes": count_stored_bytes(models[name]),
        }
        for plain in ("bfloat16", "float16"):
            ratios = [own / other for own, other in zip(times, found[plain], strict=True)]
            rows[name][f"over {plain}"] = statistics.median(ratios)
    return rows


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(build_all(), options.tokens, options.rounds)
    for name, row in rows.items():
        print(
            f"{name:22} {row['milliseconds']:8.1f} ms  {row['over bfloat16']:.2f} of bfloat16  "
            f"{row['over float16']:.2f} of float16  {row['bytes'] / 1e6:.0f} MB"
        )
    machine = {"isa": find_isa().name, "processor": platform.processor() or platform.machine()}
    record = vars(options) | machine | {"load": os.getloadavg()[0], "torch": torch.__version__, "rows": rows}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
