"""GPU kernels against the card's own copy and bitsandbytes: correctness, then GB/s, in one run.

    python benchmarks/kernels_gpu.py [--size 4096] [--repeats 50]

Needs the extra kbit[cuda]; bitsandbytes is skipped, with a word, where it is not installed. First every kernel, and
kbit.quantize and kbit.fake_quantize on them, must equal the CPU's results bit for bit.
GB/s counts the bytes that an operation must read and write once: weights at 2 bytes, codes at 1 (bitsandbytes' 4-bit
codes at 1/2), scales at 4. Copy is torch's copy of the same weights. Calls go over several tensors in turn, together
larger than the card's cache, and are queued behind a pause, so that CUDA events measure the card and not Python. Prints
a table, writes benchmarks/results/kernels_gpu.json. Exit code 1: a kernel is wrong; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbit.kernels import cpu
from kbit.kernels import cuda as kernels
from kbit.numerics.codebooks import Codebook, decision_thresholds
from kbit.numerics.data_types import make_codebook
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.quantizer import quantize as quantize_tensor
from kbit.numerics.spec import QuantSpec

torch_cuda: Any = torch.cuda  # partly annotated

RESULTS = Path(__file__).parent / "results" / "kernels_gpu.json"
FORMATS = ((3, "nf"), (4, "nf"), (8, "dynamic"))  # bitsandbytes has the second as nf4 and a variant of the third
BLOCK_SIZES = (64, 4096)
DTYPES = (torch.float16, torch.bfloat16)
TENSORS = 8  # 8 x 32 MiB at the default size: H100's cache is 50 MB, the RTX 5090's 96 MB
WARM_UP = 8
PAUSE_CYCLES = 400_000_000  # about 0.2 s: longer than it takes to queue the calls

Call = Callable[[int], Any]  # of the number of the tensor


@dataclass(frozen=True)
class Row:
    """One measured operation."""

    library: str
    operation: str
    bits: int  # 16: no quantization
    block_size: int
    dtype: str
    microseconds: float  # median of the repeats
    gigabytes_per_second: float
    of_copy: float  # share of the copy's GB/s


def measure(call: Call, repeats: int) -> float:
    """Return the median time of a call on the card, in microseconds."""
    for i in range(WARM_UP):
        call(i % TENSORS)
    torch_cuda.synchronize()
    events = [[torch_cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch_cuda._sleep(PAUSE_CYCLES)
    for i, (start, end) in enumerate(events):
        start.record()
        call(i % TENSORS)
        end.record()
    torch_cuda.synchronize()
    return 1000.0 * statistics.median(float(start.elapsed_time(end)) for start, end in events)


def as_words(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def list_kbit_calls(
    tensors: list[torch.Tensor], codebook: Codebook, block_size: int
) -> Iterator[tuple[str, Call, float]]:
    """Yield each operation of kbit.kernels.cuda with a call of it and the bytes that it moves."""
    n, thresholds = tensors[0].numel(), decision_thresholds(codebook)
    shape, scale_bytes = (n, block_size), 4 * n / block_size
    xs, outs = [as_words(x) for x in tensors], [as_words(torch.empty_like(x)) for x in tensors]
    scales = [x.view(-1, block_size).abs().amax(1).float() for x in tensors]
    zeros = torch.zeros_like(scales[0])
    refused = torch.zeros(1, dtype=torch.uint8, device=xs[0].device)
    codes = [kernels.quantize(xs[i], scales[i], zeros, codebook, thresholds, *shape) for i in range(len(xs))]
    yield "block_extremes", lambda i: kernels.block_extremes(xs[i], *shape), 2 * n + 2 * scale_bytes
    yield (
        "quantize",
        lambda i: kernels.quantize(xs[i], scales[i], zeros, codebook, thresholds, *shape),
        3 * n + 2 * scale_bytes,
    )
    yield (
        "dequantize",
        lambda i: kernels.dequantize(codes[i], scales[i], zeros, codebook, *shape, outs[i]),
        3 * n + 2 * scale_bytes,
    )
    yield (
        "fake_quantize",
        lambda i: kernels.fake_quantize(xs[i], scales[i], zeros, codebook, thresholds, *shape, None, outs[i]),
        4 * n + 2 * scale_bytes,
    )
    yield (
        "fake_quantize_absmax",
        lambda i: kernels.fake_quantize_absmax(xs[i], codebook, thresholds, *shape, "fp32", outs[i], refused),
        4 * n,
    )


def list_bitsandbytes_calls(
    tensors: list[torch.Tensor], bits: int, block_size: int
) -> Iterator[tuple[str, Call, float]]:
    """The same of bitsandbytes, which finds the scales inside quantize and has no fused quantize-dequantize."""
    import bitsandbytes.functional as bnb

    n, scale_bytes = tensors[0].numel(), 4 * tensors[0].numel() / block_size
    if bits == 4:
        quantized = [bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4") for x in tensors]
        yield (
            "quantize_4bit",
            lambda i: bnb.quantize_4bit(tensors[i], blocksize=block_size, quant_type="nf4"),
            2.5 * n + scale_bytes,
        )
        yield "dequantize_4bit", lambda i: bnb.dequantize_4bit(*quantized[i]), 2.5 * n + scale_bytes
    if bits == 8:
        quantized = [bnb.quantize_blockwise(x, blocksize=block_size) for x in tensors]
        yield (
            "quantize_blockwise",
            lambda i: bnb.quantize_blockwise(tensors[i], blocksize=block_size),
            3 * n + scale_bytes,
        )
        yield "dequantize_blockwise", lambda i: bnb.dequantize_blockwise(*quantized[i]), 3 * n + scale_bytes


def find_public_errors(x: torch.Tensor, spec: QuantSpec) -> list[str]:
    """Return which of kbit's own functions give another result on the card than on the CPU."""
    on_cpu = x.cpu()
    same = {
        "kbit.quantize": np.array_equal(quantize_tensor(x, spec).codes, quantize_tensor(on_cpu, spec).codes),
        "kbit.fake_quantize": torch.equal(fake_quantize(x, spec).cpu(), fake_quantize(on_cpu, spec)),
    }
    return [name for name, is_same in same.items() if not is_same]


def find_errors(x: torch.Tensor, codebook: Codebook, block_size: int) -> list[str]:
    """Return the operations whose result is not that of kbit.kernels.cpu, bit for bit."""
    refused = torch.zeros(1, dtype=torch.uint8, device=x.device)
    words, n, thresholds = as_words(x), x.numel(), decision_thresholds(codebook)
    on_cpu = words.cpu().numpy()
    low, high = cpu.block_extremes(on_cpu, n, block_size)
    scales = np.maximum(high, -low)
    zeros, out = np.zeros_like(scales), words.new_empty(n)
    device_scales, device_zeros = torch.from_numpy(scales).to(x.device), torch.from_numpy(zeros).to(x.device)
    codes = cpu.quantize(on_cpu, scales, zeros, codebook, thresholds, n, block_size)
    device_codes = kernels.quantize(words, device_scales, device_zeros, codebook, thresholds, n, block_size)
    values = cpu.dequantize(codes, scales, zeros, codebook, n, block_size, np.empty_like(on_cpu))
    errors = [] if np.array_equal(device_codes.cpu().numpy(), codes) else ["quantize"]
    operations: dict[str, Callable[[], Any]] = {
        "dequantize": lambda: kernels.dequantize(
            device_codes, device_scales, device_zeros, codebook, n, block_size, out
        ),
        "fake_quantize": lambda: kernels.fake_quantize(
            words, device_scales, device_zeros, codebook, thresholds, n, block_size, None, out
        ),
        "fake_quantize_absmax": lambda: kernels.fake_quantize_absmax(
            words, codebook, thresholds, n, block_size, "fp32", out, refused
        ),
    }
    for name, operation in operations.items():
        out.zero_()
        operation()
        if not np.array_equal(out.cpu().numpy().view(np.uint16), values.view(np.uint16)):
            errors.append(name)
    return errors


def check_all(size: int) -> Iterator[str]:
    """Yield what is wrong, by format, block size and dtype."""
    for (bits, data_type), block_size, dtype in itertools.product(FORMATS, BLOCK_SIZES, DTYPES):
        x = torch.randn(size * size, device="cuda").to(dtype)
        errors = find_errors(x, make_codebook(data_type, bits), block_size)
        if errors := errors + find_public_errors(x, QuantSpec(bits, data_type, block_size=block_size)):
            yield f"WRONG at {bits} bits, block {block_size}, {dtype}: {', '.join(errors)}"


def list_rows(size: int, repeats: int, with_bitsandbytes: bool) -> Iterator[Row]:
    """Measure everything; a copy comes first in each dtype, since the others are given as a share of it."""
    n = size * size
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        tensors = [torch.randn(n, device="cuda").to(dtype) for _ in range(TENSORS)]
        outs = [torch.empty_like(x) for x in tensors]

        def copy(i: int, tensors: list[torch.Tensor] = tensors, outs: list[torch.Tensor] = outs) -> None:
            outs[i].copy_(tensors[i])

        microseconds = measure(copy, repeats)
        copy_speed = 4 * n / microseconds / 1000
        yield Row("torch", "copy", 16, 0, name, microseconds, copy_speed, 1.0)
        for bits, data_type in FORMATS:
            for block_size in BLOCK_SIZES:
                calls = [
                    ("kbit", *call) for call in list_kbit_calls(tensors, make_codebook(data_type, bits), block_size)
                ]
                if with_bitsandbytes:
                    calls += [("bitsandbytes", *call) for call in list_bitsandbytes_calls(tensors, bits, block_size)]
                for library, operation, call, moved in calls:
                    microseconds = measure(call, repeats)
                    speed = moved / microseconds / 1000
                    yield Row(library, operation, bits, block_size, name, microseconds, speed, speed / copy_speed)


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight (default 4096)")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.size % 64:
        parser.error(f"--size {arguments.size} is not a multiple of 64: blocks of 4096 would not fill the tensor")
    if not torch_cuda.is_available():
        print("no CUDA device: torch finds no GPU, so there is nothing to measure", file=sys.stderr)
        return 2
    if wrong := list(check_all(arguments.size)):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    print("correct: all kernels, and kbit.quantize and fake_quantize on them, equal the CPU's bit for bit")
    versions = {package: find_version(package) for package in ("torch", "numba", "numba-cuda", "bitsandbytes")}
    if versions["bitsandbytes"] is None:
        print("bitsandbytes is not installed: skipped")
    device = torch_cuda.get_device_name()
    print(f"{device}, {versions}\n")
    print(f"{'library':14}{'operation':22}{'bits':>5}{'block':>7}  {'dtype':10}{'us':>9}{'GB/s':>9}{'of copy':>9}")
    rows = []
    for row in list_rows(arguments.size, arguments.repeats, versions["bitsandbytes"] is not None):
        rows.append(row)
        print(
            f"{row.library:14}{row.operation:22}{row.bits:5}{row.block_size:7}  {row.dtype:10}"
            f"{row.microseconds:9.1f}{row.gigabytes_per_second:9.1f}{row.of_copy:9.0%}"
        )
    record = {"device": device, "versions": versions, "size": arguments.size, "repeats": arguments.repeats}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(f"\nwritten to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
