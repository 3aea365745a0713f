"""Stage 3: products of a few inputs with packed weights beside torch's in bfloat16, by the kernel and by the layer.

GB/s counts the bytes of the packed weight. The aim is a share of the copy's, which counts what it reads and writes.
Weights are taken in turn and together are larger than the card's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from card import Call, Card, Report

from kbit.kernels import cuda_linear
from kbit.kernels.cpu_linear import BATCHES
from kbit.layers.fused import make_matrix
from kbit.layers.quantized_linear import QuantizedLinear
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

AIM = 0.7  # of the copy's GB/s in packed bytes, for one input
CACHE = 200e6  # bytes, more than any card's
SPECS = {
    f"{name}{bits}": QuantSpec(bits, name, block_size=64)
    for name, bits in (("nf", 4), ("int", 4), ("nf", 3), ("int", 8), ("nf", 2))
}
# In norms of a row: the kernel adds 11008 products up in float32, and the layer's inputs and results are bfloat16.
LARGEST_ERROR = {"kernel": 1e-5, "layer": 2.0**-6}


@dataclass(frozen=True)
class Sizes:
    """What is measured: matrices [out, in], inputs at once, quantizers."""

    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    specs: tuple[str, ...]
    repeats: int


FULL = Sizes(((4096, 4096), (11008, 4096), (4096, 11008)), (1, 8, 32), tuple(SPECS), 30)
READY = Sizes(((2, 64),), (1, 2), ("nf4",), 1)


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Measure torch's product, then each quantizer's, at each shape and batch."""
    torch.set_grad_enabled(False)
    for out, columns in sizes.shapes:
        copied = card.time_copy(out * columns, torch.bfloat16, sizes.repeats)
        w = 0.02 * torch.randn(out, columns, device=card.device)
        times = {}
        for batch in sizes.batches:
            call, count = _call_torch(w, batch, card)
            timing = card.time(call, count, sizes.repeats)
            times[batch] = timing.microseconds
            report.add(name="torch bfloat16", shape=f"{out} x {columns}", batch=batch, **asdict(timing))
        for name in sizes.specs:
            q = quantize(w.bfloat16(), SPECS[name])
            for batch in sizes.batches:
                for kind, error, path, (call, count) in _list_calls(card, q, batch):
                    timing = card.time(call, count, sizes.repeats)
                    speed = q.nbytes / timing.microseconds / 1000
                    report.add(
                        name=f"kbit {name} {kind}", shape=f"{out} x {columns}", batch=batch, path=path,
                        **asdict(timing), packed_bytes=q.nbytes, gigabytes_per_second=speed, of_copy=speed / copied,
                        times_as_fast_as_torch=times[batch] / timing.microseconds, error=error,
                        wrong=[] if error < LARGEST_ERROR[kind] else [f"error {error:.1e}"],
                    )  # fmt: skip


def _call_torch(w: torch.Tensor, batch: int, card: Card) -> tuple[Call, int]:
    x = torch.randn(batch, w.shape[1], device=card.device, dtype=torch.bfloat16)
    weights = [w.bfloat16() for _ in range(_count_copies(2 * w.numel(), card))]
    return lambda i: F.linear(x, weights[i]), len(weights)


def _count_copies(nbytes: int, card: Card) -> int:
    return max(2, math.ceil(CACHE / nbytes)) if card.is_real else 1


def _list_calls(card: Card, q: QuantizedTensor, batch: int) -> Iterator[tuple[str, float, str, tuple[Call, int]]]:
    """Yield the kernel, if it takes such a batch, and the layer, with the largest error in norms of a row."""
    x = torch.randn(batch, q.shape[1], device=card.device)
    w = dataclasses.replace(q, dtype=torch.float32).dequantize().double()  # not rounded to bfloat16, as in the kernel
    count = _count_copies(q.nbytes, card)
    norm = float(w.norm(dim=1).max())
    if batch in BATCHES:
        matrices = [make_matrix(_copy(q)) for _ in range(count)]
        flat = card.view(x.view(-1))
        y = torch.from_numpy(card.get(cuda_linear.multiply(flat, matrices[0]))).view(batch, -1)
        error = float((y.double() - (x.double() @ w.t()).cpu()).abs().max()) / norm
        yield "kernel", error, "fused", (lambda i: cuda_linear.multiply(flat, matrices[i]), count)
    layers = [QuantizedLinear.from_codes(_copy(q), torch.nn.Linear(1, 1, bias=False)) for _ in range(count)]
    x16 = x.bfloat16()
    expected = x16.double() @ w.t()
    error = float((layers[0](x16).double() - expected).abs().max()) / norm
    for layer in layers:
        layer(x16)
    path = layers[0].choose_path(batch, torch.bfloat16)
    yield "layer", error, path, (lambda i: layers[i](x16), count)


def _copy(q: QuantizedTensor) -> QuantizedTensor:
    """Return the tensor with codes of its own, so that the cache does not hold what was read before."""
    return dataclasses.replace(q, codes=q.codes.clone(), scales={n: s.clone() for n, s in q.scales.items()})


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield each quantizer's range at each batch."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "of_copy" in row:
            found.setdefault((row["batch"], row["name"]), []).append(row)
    for (batch, name), same in sorted(found.items()):
        shares, ratios = [row["of_copy"] for row in same], [row["times_as_fast_as_torch"] for row in same]
        yield (
            f"{name}, batch {batch}: {min(shares):.0%} to {max(shares):.0%} of the copy, {min(ratios):.2f} to "
            f"{max(ratios):.2f} times as fast as torch's bfloat16"
        )
    aimed = [row for row in rows if "of_copy" in row and row["batch"] == 1 and row["name"].endswith(" kernel")]
    below = [row for row in aimed if row["of_copy"] < AIM]
    yield f"below the aim of {AIM:.0%} of the copy for the kernel at batch 1: {len(below)} of {len(aimed)}"
    yield from (f"{row['name']}, {row['shape']}: {row['wrong'][0]}" for row in rows if row.get("wrong"))
