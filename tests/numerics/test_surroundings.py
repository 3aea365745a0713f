"""What quantizers meet: threads, forked processes, inference mode, autograd, tensors beyond 2^31 elements."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kbit.kernels import cpu, cpu_chunks
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, restore_weights
from kbit.numerics.grid import find_blocks
from kbit.numerics.quantizer import fake_quantize, fake_quantize_, quantize
from kbit.numerics.spec import QuantSpec

SPEC = QuantSpec(bits=4, data_type="nf")


def make_values(seed: int) -> torch.Tensor:
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(seed))


def test_python_threads_at_once_give_what_they_give_alone() -> None:
    inputs = [make_values(seed) for seed in range(4)]
    expected, threads = [fake_quantize(x, SPEC) for x in inputs], torch.get_num_threads()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if not torch.equal(quantize(inputs[number], SPEC).dequantize(), expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="OpenMP is another one there")
def test_a_process_that_was_forked_after_the_first_use_is_told_so() -> None:
    """Without the error GNU's OpenMP ends the process by a signal."""
    x = make_values(0)
    fake_quantize(x, SPEC)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            fake_quantize(x, SPEC)
        except RuntimeError as error:
            code = 42 if "was forked from one in which kbit's kernels ran" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 42


def test_tensors_of_inference_mode_are_quantized_inside_and_outside() -> None:
    expected = fake_quantize(make_values(0), SPEC)
    with torch.inference_mode():
        x = make_values(0)
        assert torch.equal(fake_quantize(x, SPEC), expected)
        codes = quantize(x, SPEC)
        assert torch.equal(codes.dequantize(), expected)
        assert torch.equal(fake_quantize_(x.clone(), SPEC), expected)
    assert torch.equal(codes.dequantize(), expected)
    assert torch.equal(fake_quantize_(x, SPEC), expected)


@pytest.mark.parametrize("method", ["rtn", "hqq", "llm_int8"])
def test_a_model_of_inference_mode_is_quantized_and_restored(method: str) -> None:
    bits = {"bits": 8} if method == "llm_int8" else {"bits": 3}
    config = QuantConfig(**bits, method=method, outlier_fraction=0.05, outlier_selection="column")
    weights = []
    for inside in (True, False):
        with torch.inference_mode(inside):
            torch.manual_seed(0)
            model = nn.Module()
            model.layers = nn.ModuleList([nn.Linear(64, 64)])
        before = model.layers[0].weight.clone()
        report = quantize_model(model, config)
        copies = dict.fromkeys(copy_weights(model, report), before)
        weights.append(model.layers[0].weight.clone())
        restore_weights(model, copies)
        assert torch.equal(model.layers[0].weight, before)
    assert torch.equal(*weights)


@pytest.mark.parametrize("change", [fake_quantize_, lambda x, spec: _quantize_layer(x, spec)])
def test_no_gradient_is_of_values_that_were_replaced(change: Callable[[Any, QuantSpec], Any]) -> None:
    x = nn.Parameter(make_values(0))
    assert not fake_quantize(x, SPEC).requires_grad
    loss = x.square().sum()
    change(x, SPEC)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    x.square().sum().backward()  # of the new ones
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())


def _quantize_layer(weight: nn.Parameter, spec: QuantSpec) -> None:
    model, layer = nn.Module(), nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    model.layers = nn.ModuleList([layer])
    quantize_model(model, spec)


def test_elements_beyond_2_to_31_have_their_places() -> None:
    """A tensor of zeros takes no memory before it is written: its last value decides the last block."""
    row, block = 2**31 + 24, 2**20
    x = np.zeros(row, np.float16)
    x[-1], x[-24] = 3, -5
    low, high = cpu.block_extremes(x, row, block)
    assert (low[-1], high[-1], len(high)) == (-5, 3, 2**11 + 1)
    assert not low[:-1].any()
    for start in (2**31 - 1, 2**31, 2**33 + 5, 2**40 + 1):
        number = start // 1000 * 16 + start % 1000 // 64
        assert cpu_chunks.first_block(start, 1000, 64)[0] == number == find_blocks(torch.tensor(start), 1000, 64)
        assert cpu_chunks.block_start(number, 1000, 64) == start // 1000 * 1000 + start % 1000 // 64 * 64
