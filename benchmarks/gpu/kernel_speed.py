"""Stage 2: GB/s of the kernels beside the card's own copy and bitsandbytes, all in one run.

GB/s counts the bytes that an operation must read and write once: weights, packed codes, and scales at 4 bytes. Copy is
torch's copy of as many weights of the same dtype. Calls take several tensors in turn, together larger than the card's
cache.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from card import Call, Card, Report

from kbit.kernels import cuda as kernels
from kbit.numerics.codebooks import decision_thresholds
from kbit.numerics.data_types import make_codebook

AIM = 0.8  # of the copy, for fake_quantize up to 5 bits
TENSORS = 3  # 3 x 90 MB at the smallest: H100's cache is 50 MB, the RTX 5090's 96 MB
FORMATS = ((3, "nf"), (4, "nf"), (8, "dynamic"))  # bitsandbytes has the second as nf4 and a variant of the third


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shapes: tuple[tuple[int, int], ...]
    block_sizes: tuple[int, ...]
    formats: tuple[tuple[int, str], ...]
    dtypes: tuple[torch.dtype, ...]
    repeats: int


FULL = Sizes(((4096, 11008), (8192, 8192)), (64, 4096), FORMATS, (torch.bfloat16, torch.float32), 30)
READY = Sizes(((2, 32),), (16,), FORMATS[1:2], (torch.bfloat16,), 1)


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Measure everything. A copy comes first of each shape and dtype, as the others are given as a share of it."""
    for shape, dtype in itertools.product(sizes.shapes, sizes.dtypes):
        n = shape[0] * shape[1]
        given = {"shape": f"{shape[0]} x {shape[1]}", "dtype": str(dtype).removeprefix("torch.")}
        copied = card.time_copy(n, dtype, sizes.repeats)
        report.add(library="torch", operation="copy", bits=16, block_size=0, **given, gigabytes_per_second=copied)
        tensors = [torch.randn(n, device=card.device).to(dtype) for _ in range(TENSORS)]
        for (bits, data_type), block_size in itertools.product(sizes.formats, sizes.block_sizes):
            calls = [("kbit", *call) for call in list_kbit_calls(card, tensors, bits, data_type, block_size)]
            calls += [("bitsandbytes", *call) for call in _try_bitsandbytes(card, tensors, bits, block_size)]
            for library, operation, call, moved in calls:
                timing = card.time(call, TENSORS, sizes.repeats)
                speed = moved / timing.microseconds / 1000
                report.add(
                    library=library, operation=operation, bits=bits, block_size=block_size, **given, **asdict(timing),
                    gigabytes_per_second=speed, of_copy=speed / copied,
                )  # fmt: skip


def list_kbit_calls(
    card: Card, tensors: list[torch.Tensor], bits: int, data_type: str, block_size: int
) -> Iterator[tuple[str, Call, float]]:
    """Yield each operation of kbit.kernels.cuda with a call of it and the bytes that it moves."""
    codebook = make_codebook(data_type, bits)
    thresholds, n, weight = decision_thresholds(codebook), tensors[0].numel(), tensors[0].element_size()
    shape, constants = (n, block_size), 2 * 4 * n / block_size
    xs, outs = [card.view(x) for x in tensors], [card.view(torch.empty_like(x)) for x in tensors]
    scales = [card.view(x.view(-1, block_size).abs().amax(1).float()) for x in tensors]
    zeros = card.view(torch.zeros(n // block_size, device=card.device))
    refused = card.view(torch.zeros(1, dtype=torch.uint8, device=card.device))

    def quantize(i: int) -> Any:
        return kernels.quantize(xs[i], scales[i], zeros, codebook, thresholds, *shape, None, bits)

    codes = [quantize(i) for i in range(len(xs))]
    yield "block_extremes", lambda i: kernels.block_extremes(xs[i], *shape), n * weight + constants
    yield "quantize", quantize, n * (weight + bits / 8) + constants
    yield (
        "dequantize",
        lambda i: kernels.dequantize(codes[i], scales[i], zeros, codebook, *shape, outs[i], bits),
        n * (weight + bits / 8) + constants,
    )
    yield (
        "fake_quantize",
        lambda i: kernels.fake_quantize(xs[i], scales[i], zeros, codebook, thresholds, *shape, None, outs[i]),
        2 * n * weight + constants,
    )
    yield (
        "fake_quantize_absmax",
        lambda i: kernels.fake_quantize_absmax(xs[i], codebook, thresholds, *shape, "fp32", outs[i], refused),
        2 * n * weight,
    )


def _try_bitsandbytes(
    card: Card, tensors: list[torch.Tensor], bits: int, block_size: int
) -> list[tuple[str, Call, float]]:
    """Return bitsandbytes' calls, or none where it is not there or does not run on this card."""
    if not card.is_real or not importlib.util.find_spec("bitsandbytes"):
        return []
    try:
        return list(list_bitsandbytes_calls(tensors, bits, block_size))
    except Exception as error:  # a build for another CUDA: of whatever kind, it must not end the stage
        print(f"bitsandbytes does not run here: {error}")
        return []


def list_bitsandbytes_calls(
    tensors: list[torch.Tensor], bits: int, block_size: int
) -> Iterator[tuple[str, Call, float]]:
    """The same of bitsandbytes, which finds the scales inside quantize and has no fused quantize-dequantize."""
    import bitsandbytes.functional as bnb

    n, weight = tensors[0].numel(), tensors[0].element_size()
    moved = n * (weight + bits / 8) + 4 * n / block_size
    if bits == 4:
        quantized = [bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4") for x in tensors]
        yield (
            "quantize_4bit",
            lambda i: bnb.quantize_4bit(tensors[i], blocksize=block_size, quant_type="nf4"),
            moved,
        )
        yield "dequantize_4bit", lambda i: bnb.dequantize_4bit(*quantized[i]), moved
    if bits == 8:
        quantized = [bnb.quantize_blockwise(x, blocksize=block_size) for x in tensors]
        yield "quantize_blockwise", lambda i: bnb.quantize_blockwise(tensors[i], blocksize=block_size), moved
        yield "dequantize_blockwise", lambda i: bnb.dequantize_blockwise(*quantized[i]), moved


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each operation's share of the copy, from the least to the largest, and what misses the aim."""
    shares: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "of_copy" in row:
            shares.setdefault((row["library"], row["operation"]), []).append(row["of_copy"])
    for (library, operation), found in shares.items():
        yield f"{library} {operation}: {min(found):.0%} to {max(found):.0%} of the copy"
    aimed = [row for row in rows if row["operation"] in ("fake_quantize", "fake_quantize_absmax") and row["bits"] <= 5]
    below = [row for row in aimed if row["of_copy"] < AIM]
    yield f"aim of {AIM:.0%} for fake quantization up to 5 bits: missed by {len(below)} of {len(aimed)}"
