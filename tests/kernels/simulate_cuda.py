"""A process of its own, since numba decides on import whether to simulate: run by test_cuda.py.

Prints as JSON what is wrong, by name of the case: of the kernels against kbit.numerics.reference, and of kbit's public
functions with these kernels in the place of the CPU's.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import cuda_cases
import cuda_products
import numpy as np
import state_cases
import torch
from cuda_cases import DTYPES, as_words, compare
from simulator import prepare_simulator

from kbit.kernels import cuda as kernels
from kbit.kernels import cuda_arrays, cuda_linear, cuda_states
from kbit.numerics import quantized_tensor, quantizer, reference
from kbit.numerics.backend import Backend, choose_backend
from kbit.numerics.grid import make_grid
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.numerics.spec import NORMALIZATIONS, ROUNDINGS, QuantSpec

CPU = choose_backend(torch.device("cpu"))
GPU = Backend(torch.device("cpu"), kernels, is_gpu=True)  # the simulated one: its memory is the CPU's


def list_specs() -> Iterator[QuantSpec]:
    """Every allowed pair of scale format, normalization and rounding; the other fields take turns beside them."""
    types = itertools.cycle([(4, "nf"), (3, "learned"), (8, "int"), (4, "quantile"), (5, "dynamic"), (6, "float")])
    for i, (scale_format, normalization) in enumerate(itertools.product(SCALE_FORMATS, NORMALIZATIONS)):
        bits, data_type = next(types)
        rounding = ROUNDINGS[(i // 3 + i) % 4]
        if scale_format != "e8m0" or normalization == "absmax":
            yield QuantSpec(
                bits, data_type, block_size=(16, 5, None)[(i // 3 - i) % 3], layout=("flat", "row")[i // 2 % 2],
                normalization=normalization, centering=i % 4 == 1, scale_format=scale_format, rounding=rounding, seed=i,
            )  # fmt: skip
    for scale_format, rounding in (("fp16", "nearest"), ("bf16", "nearest_even"), ("fp32", "nearest")):  # fused
        yield QuantSpec(4, "nf", block_size=20, scale_format=scale_format, rounding=rounding)


def find_differences(x: torch.Tensor, spec: QuantSpec) -> Iterator[str]:
    """Compare the public functions on the simulated GPU with the plain definition."""
    values = x.view(-1).to(torch.float32 if x.dtype == torch.float64 else x.dtype)
    # the estimated quantiles are tested by themselves; everything else must be what the CPU has
    grid = make_grid(values, x.shape, spec, GPU if spec.data_type == "quantile" else CPU)
    tables, shape = (grid.scales, grid.offsets, grid.codebook), (grid.row, grid.block_size)
    codes = reference.quantize(values.float().numpy(), *tables, grid.thresholds, *shape, grid.seed)
    expected = torch.from_numpy(reference.dequantize(codes, *tables, *shape)).to(values.dtype)
    q = quantizer.quantize(x, spec)
    yield from compare("quantize", q.unpack_codes().numpy(), codes)
    for name, result in (
        ("dequantize", quantizer.dequantize(q, "cuda")),
        ("fake_quantize", quantizer.fake_quantize(x, spec)),
        ("fake_quantize_", quantizer.fake_quantize_(x.clone(), spec)),
    ):
        if result.shape != x.shape or result.dtype != x.dtype:
            yield f"{name}: {result.dtype} {tuple(result.shape)}"
        yield from compare(name, as_words(result.to(values.dtype)).ravel(), as_words(expected))


def check_public_functions() -> dict[str, list[str]]:
    """Return the differences by spec, and the errors that bad values must raise."""
    differences: dict[str, list[str]] = {}
    with (
        patch.object(quantizer, "choose_backend", lambda device: GPU),
        patch.object(quantized_tensor, "choose_backend", lambda device: GPU),
    ):
        dtypes = itertools.cycle([*DTYPES.values(), torch.float64])
        for spec in list_specs():
            dtype = next(dtypes)
            x = torch.from_numpy(cuda_cases.awkward_values(56)).to(dtype).view(2, 28)
            differences[f"{spec} {dtype}"] = list(find_differences(x, spec))
        differences["errors"] = list(find_missing_errors())
    return differences


def find_missing_errors() -> Iterator[str]:
    """The fused kernel raises nothing itself: what it refuses must come out as the error that the CPU gives."""
    spec = QuantSpec(4, "nf", block_size=16)
    for value, message in ((np.nan, "1 of 32 values are NaN or Inf"), (65520.0, "beyond fp16")):
        x = torch.ones(32)
        x[20] = value
        try:
            quantizer.fake_quantize(x, spec)
        except ValueError as error:
            if message not in str(error):
                yield f"{value}: {error}"
        else:
            yield f"{value}: no error"


def find_wrong_groups() -> list[str]:
    """Let several groups of several warps share a thread block, as on a GPU, where simulated ones have 8 threads."""
    x = np.linspace(1, 2, 2048, dtype=np.float32) * np.repeat(np.array([1, 1e-3, 1e-2, 1e-1], np.float32), 512)
    x[::2] *= -1
    with patch.object(cuda_arrays, "thread_count", lambda: 128):  # of 64 threads a block, as it has 256 words
        least, most = kernels.block_extremes(x, x.size, 512)
    blocks = x.reshape(-1, 512)
    wrong = compare("least", np.asarray(least), blocks.min(axis=1))
    wrong += compare("largest", np.asarray(most), blocks.max(axis=1))
    return wrong


def find_arrays_without_device() -> list[str]:
    """Return who makes numba's arrays outside device_of: numba would ask another GPU for their memory."""
    inside, wrong, as_numba = [False], [], cuda_arrays.as_numba

    @contextmanager
    def enter(*_: Any) -> Iterator[None]:
        before, inside[0] = inside[0], True
        yield
        inside[0] = before

    def note(x: Any, dtype: Any = None) -> Any:
        if not inside[0]:
            wrong.append(sys._getframe(1).f_code.co_name)
        return as_numba(x, dtype)

    with ExitStack() as patches:
        for module in (kernels, cuda_arrays, cuda_linear, cuda_states):
            for name, watched in (("device_of", enter), ("as_numba", note)):
                patches.enter_context(patch.object(module, name, watched))
        for limit in (4096, 8):  # fused, and in two passes
            wrong += cuda_cases.check_case(cuda_cases.Case(row=32, n=32, limit=limit), np.array, np.asarray)
        wrong += cuda_products.find_wrong_products(np.array, np.asarray, cuda_products.CASES[3:4])
        wrong += state_cases.find_wrong_steps(np.array, np.asarray, state_cases.STEPS[1:3])
    return wrong


def find_missing_notes() -> list[str]:
    """An error at a launch says which kernel it was, and how to find an earlier one."""
    kernel = MagicMock(__name__="broken")
    kernel.__getitem__.return_value.side_effect = RuntimeError("an illegal memory access")
    try:
        cuda_arrays.launch(kernel, 3)
    except RuntimeError as error:
        expected = "kbit's CUDA kernel broken (1 x 8 threads) or one before it failed: CUDA_LAUNCH_BLOCKING=1 tells"
        return [note for note in error.__notes__ if not note.startswith(expected)]
    return ["no error"]


def main() -> None:
    prepare_simulator()
    results = {str(case): cuda_cases.check_case(case, np.array, np.asarray) for case in cuda_cases.CASES}
    results["pack"] = cuda_cases.check_pack(np.array, np.asarray)
    results["special"] = cuda_cases.check_special_values(np.array, np.asarray)
    results["tiny"] = cuda_cases.check_tiny_scales(np.array, np.asarray)
    results["nothing"] = cuda_cases.check_nothing(np.array, np.asarray)
    results["nothing"] += state_cases.find_wrong_empty_steps(np.array, np.asarray)
    results["devices"] = find_arrays_without_device()
    results["error"] = find_missing_notes()
    results["groups"] = find_wrong_groups()
    results["steps"] = state_cases.find_wrong_steps(np.array, np.asarray)
    results["products"] = cuda_products.find_wrong_products(np.array, np.asarray)
    print(json.dumps({"kernels": results, "public": check_public_functions()}))


if __name__ == "__main__":
    main()
