"""CUDA kernels, and kbit on them: in numba's simulator, without a device, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_cases
import cuda_products
import numpy as np
import pytest
import state_cases
import torch
from cuda_cases import DTYPES, Array, Case
from torch._subclasses.fake_tensor import FakeTensorMode

from kbit.kernels import cuda as kernels
from kbit.kernels import cuda_arrays
from kbit.numerics import quantizer
from kbit.numerics.backend import choose_backend
from kbit.numerics.codebooks import decision_thresholds
from kbit.numerics.data_types import make_codebook
from kbit.numerics.spec import QuantSpec

numba_cuda: Any = importlib.import_module("numba.cuda")  # Any: it and torch.cuda are only partly annotated
torch_cuda: Any = torch.cuda

SIMULATED = [str(case) for case in cuda_cases.CASES] + [
    *("pack", "special", "tiny", "products", "groups", "steps", "nothing", "devices", "error")
]


# ---- the simulator ----


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, list[str]]]:
    """What is wrong, by case, found under the simulator."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).parent / "simulate_cuda.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_kernels_equal_reference(case: str, outcomes: dict[str, dict[str, list[str]]]) -> None:
    assert outcomes["kernels"][case] == []


def test_public_functions_on_a_simulated_gpu_equal_reference(outcomes: dict[str, dict[str, list[str]]]) -> None:
    assert len(outcomes["public"]) == 20  # specs, and the errors
    assert {name: wrong for name, wrong in outcomes["public"].items() if wrong} == {}


# ---- no device ----


def test_error_without_device() -> None:
    """Nothing falls back to the CPU."""
    if numba_cuda.is_available():
        pytest.skip("there is a CUDA device")
    x, codebook = np.zeros(64, np.float32), make_codebook("int", 4)
    grid = (x[:1], x[:1], codebook, decision_thresholds(codebook), 64, 64)
    calls: list[Callable[[], Any]] = [
        lambda: kernels.block_extremes(x, 64, 64),
        lambda: kernels.quantize(x, *grid),
        lambda: kernels.dequantize(np.zeros(64, np.uint8), x[:1], x[:1], codebook, 64, 64, x),
        lambda: kernels.fake_quantize(x, *grid, None, x),
        lambda: kernels.fake_quantize_absmax(x, *grid[2:], "fp16", x, np.zeros(1, np.uint8)),
        lambda: kernels.pack(np.zeros(64, np.uint8), 4),
        lambda: kernels.unpack(np.zeros(32, np.uint8), 4, 64),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            call()


def test_gpu_without_numba_cuda_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda_arrays", "cuda_device", "cuda_kernels"):
        monkeypatch.delitem(sys.modules, f"kbit.kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "numba_cuda", None)  # as if it were not installed
    q = quantizer.quantize(np.ones(64, np.float32), QuantSpec())
    with pytest.raises(ImportError, match=r"numba-cuda: pip install 'kbit\[cuda\]'"):
        quantizer.dequantize(q, "cuda")


def test_gpu_without_a_driver_is_an_error() -> None:
    if numba_cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        choose_backend(torch.device("cuda"))


@pytest.mark.parametrize("function", [quantizer.quantize, quantizer.fake_quantize, quantizer.fake_quantize_])
def test_a_tensor_on_a_gpu_goes_to_the_cuda_kernels(function: Callable[[torch.Tensor, QuantSpec], Any]) -> None:
    """Torch's fake tensors have a device without memory or a driver: the kernels must ask for one."""
    if numba_cuda.is_available():
        pytest.skip("there is a CUDA device")
    with FakeTensorMode():
        x = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"kbit\.kernels\.cuda needs a CUDA device"):
        function(x, QuantSpec())


def test_tensors_on_several_devices_are_an_error() -> None:
    """A kernel would read an address that its GPU does not have."""
    with FakeTensorMode():
        there = [torch.ones(64, device=device) for device in ("cuda:0", "cuda:1", "cpu")]
    with pytest.raises(ValueError, match=r"of one device, not of cuda:0, cuda:1: move them to cuda:0"):
        cuda_arrays.device_of(*there[:2]).__enter__()
    with pytest.raises(TypeError, match="not on device cpu, cuda:0"):
        cuda_arrays.device_of(there[0], there[2]).__enter__()


def test_an_address_between_numbers_is_an_error() -> None:
    """A GPU's load of several bytes must be aligned: it would end the process' use of the GPU."""
    array = np.zeros(16, np.uint8)
    with pytest.raises(ValueError, match="cannot be read as uint16: copy it"):
        cuda_arrays.as_numba(array[1:5], np.uint16)
    with pytest.raises(ValueError, match="cannot be read as uint64: copy it"):
        cuda_arrays.as_numba(array[4:12] if array.ctypes.data % 8 == 0 else array[:8], np.uint64)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device mps has no kernels: quantize on cpu or cuda"):
        choose_backend(torch.device("mps"))


# ---- a GPU ----


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not (torch_cuda.is_available() and numba_cuda.is_available()):
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch_cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("case", cuda_cases.CASES + cuda_cases.LARGE, ids=str)
def test_kernels_on_gpu_equal_reference(case: Case, gpu: torch.device) -> None:
    assert (
        cuda_cases.check_case(case, lambda array: torch.from_numpy(array).to(gpu), lambda tensor: tensor.cpu().numpy())
        == []
    )


@pytest.mark.gpu
def test_packing_and_special_values_on_gpu(gpu: torch.device) -> None:
    def put(array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(gpu)

    assert cuda_cases.check_pack(put, lambda tensor: tensor.cpu().numpy()) == []
    assert cuda_cases.check_special_values(put, lambda tensor: tensor.cpu().numpy()) == []
    assert cuda_cases.check_nothing(put, lambda tensor: tensor.cpu().numpy()) == []
    assert cuda_cases.check_tiny_scales(put, lambda tensor: tensor.cpu().numpy()) == []
    assert cuda_products.find_wrong_products(put, lambda tensor: tensor.cpu().numpy()) == []
    assert state_cases.find_wrong_steps(put, lambda tensor: tensor.cpu().numpy()) == []


@pytest.mark.gpu
def test_kernels_use_torchs_current_stream(gpu: torch.device) -> None:
    """A stream that is busy for a while: the result is right only if the kernel waits for it, and not for more."""
    codebook = make_codebook("int", 4)
    x, out = torch.zeros(1 << 20, device=gpu), torch.empty(1 << 20, device=gpu)
    refused, shape = torch.zeros(1, dtype=torch.uint8, device=gpu), (x.numel(), 64)
    stream = torch_cuda.Stream(gpu)
    stream.wait_stream(torch_cuda.current_stream(gpu))
    with torch_cuda.stream(stream):
        torch_cuda._sleep(100_000_000)
        x.fill_(1)
        kernels.fake_quantize_absmax(x, codebook, decision_thresholds(codebook), *shape, "fp16", out, refused)
    stream.synchronize()
    assert bool((out == 1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
@pytest.mark.parametrize("data_type", ["nf", "learned", "int"])
@pytest.mark.parametrize("scale_format", ["fp16", "dq8"])
def test_public_functions_on_gpu_equal_the_cpus(
    scale_format: str, data_type: str, dtype: torch.dtype, gpu: torch.device
) -> None:
    x = torch.from_numpy(cuda_cases.awkward_values(400_000)).to(dtype).view(400, 1000)
    spec = QuantSpec(4, data_type, scale_format=scale_format)
    on_cpu, on_gpu = quantizer.quantize(x, spec), quantizer.quantize(x.to(gpu), spec)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    values = quantizer.fake_quantize(x.to(gpu), spec)
    assert values.device == gpu
    assert torch.equal(values.cpu(), quantizer.fake_quantize(x, spec))
    assert torch.equal(quantizer.dequantize(on_gpu), values)
    assert torch.equal(quantizer.fake_quantize_(x.to(gpu), spec), values)
