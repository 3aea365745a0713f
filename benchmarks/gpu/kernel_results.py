"""Stage 1: every CUDA kernel equals the plain definition bit for bit, on torch's streams and devices.

Cases are those of tests/kernels. On a card, several processes share them, as compiling the kernels takes longest.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import cuda_cases
import cuda_products
import state_cases
import torch
from card import Card, Report

from kbit.kernels import cuda as kernels
from kbit.kernels.cpu_states import ADAM
from kbit.numerics import quantizer
from kbit.numerics.codebooks import decision_thresholds
from kbit.numerics.data_types import make_codebook
from kbit.numerics.spec import QuantSpec

PROCESSES = 8
GROUPS: dict[str, Callable[..., list[str]]] = {
    "pack": cuda_cases.check_pack,
    "special values": cuda_cases.check_special_values,
    "tiny scales": cuda_cases.check_tiny_scales,
    "no elements": cuda_cases.check_nothing,
    "products": cuda_products.find_wrong_products,
    "optimizers' steps": state_cases.find_wrong_steps,
}
LARGE = {str(case): case for case in cuda_cases.LARGE}
CASES = {str(case): case for case in cuda_cases.CASES}
# One of each path through the kernels, small enough for the simulator.
READY_CASES = list(CASES)[2:40:12]
READY_STEPS = state_cases.STEPS[1:2]
READY_PRODUCTS = cuda_products.CASES[1:2]


@dataclass(frozen=True)
class Sizes:
    """How much to do: the names of the cases, the processes, and the values of a tensor of torch's checks."""

    names: tuple[str, ...]
    processes: int
    values: int


# The most telling first: the simulator's own cases, then blocks of 4096, then the others.
FULL = Sizes(
    (*GROUPS, *CASES, *sorted(LARGE, key=lambda name: LARGE[name].block_size != 4096)),
    min(PROCESSES, os.cpu_count() or 1),
    1 << 20,
)
READY = Sizes((*READY_CASES, "tiny scales", "no elements"), 1, 64)


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Check torch's side first, then the cases."""
    for name, check in TORCH_CHECKS.items():
        if check is check_other_devices and not card.list_others():
            report.add(case=name, wrong=[], note="one card: not checked")
            continue
        report.add(case=name, wrong=_try(functools.partial(check, card, sizes.values)))
    if sizes.processes == 1:
        _check_few(card, report)
        for name in sizes.names:
            report.add(case=name, wrong=check_case(name, card))
        return
    with ProcessPoolExecutor(sizes.processes, multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(check_case, name, card): name for name in sizes.names}
        for done in as_completed(asked):
            report.add(case=asked[done], wrong=_read(done.result))


def _check_few(card: Card, report: Report) -> None:
    """Check a part of the groups that take the simulator seconds."""
    report.add(case="products", wrong=cuda_products.find_wrong_products(card.put, card.get, READY_PRODUCTS))
    report.add(case="optimizers' steps", wrong=state_cases.find_wrong_steps(card.put, card.get, READY_STEPS))


def check_case(name: str, card: Card) -> list[str]:
    """Return what is wrong with one case."""
    if name in GROUPS:
        return _try(lambda: GROUPS[name](card.put, card.get))
    return _try(lambda: cuda_cases.check_case(CASES.get(name) or LARGE[name], card.put, card.get))


def _try(check: Callable[[], list[str]]) -> list[str]:
    """Return what is wrong. A kernel that ends the process' use of the card is told by its error."""
    try:
        return check()
    except Exception as error:
        return [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", []), traceback.format_exc(limit=-3)]


def _read(result: Callable[[], list[str]]) -> list[str]:
    try:
        return result()
    except BrokenProcessPool as error:
        return [f"a process ended: {error}"]


# ---- with torch ----


def check_side_stream(card: Card, n: int) -> list[str]:
    """A stream that is busy for a while: the result is right only if the kernels wait for it, with their buffers."""
    codebook = make_codebook("int", 4)
    thresholds = decision_thresholds(codebook)
    x, out = (torch.zeros(n, device=card.device) for _ in range(2))
    with card.on_side_stream():
        card.pause()
        x.fill_(1)
        refused = torch.zeros(1, dtype=torch.uint8, device=card.device)
        arguments = card.view(x), codebook, thresholds, n, n
        # a block of the whole tensor: the extremes, the scales and the offsets are buffers that are freed on return
        kernels.fake_quantize_absmax(*arguments, "fp16", card.view(out), card.view(refused))
        spoiled = [torch.full((n,), 9.0, device=card.device) for _ in range(4)]  # may take the freed memory
        wrong = int((out != 1).sum())
    del spoiled
    card.wait()
    return [f"{wrong} of {n} values are wrong"] if wrong else []


def check_public_functions(card: Card, n: int) -> list[str]:
    """kbit.quantize and the others give the CPU's results, in each dtype, from views that begin at odd places."""
    return list(_find_public_differences(card, n))


def _find_public_differences(card: Card, n: int) -> Iterator[str]:
    specs = (QuantSpec(4, "nf"), QuantSpec(3, "int", block_size=None), QuantSpec(8, "dynamic", scale_format="dq8"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.from_numpy(cuda_cases.awkward_values(n + 1)).to(dtype)
        for spec in specs:
            for skip in (0, 1):
                x, there = values[skip : n + skip], values.to(card.device)[skip : n + skip]
                q, expected = quantizer.quantize(there, spec), quantizer.quantize(x, spec)
                if not torch.equal(q.codes.cpu(), expected.codes):
                    yield f"quantize, {spec}, {dtype}, from {skip}"
                fake, expected_values = quantizer.fake_quantize(there, spec), quantizer.fake_quantize(x, spec)
                same = _equal_bits(fake.cpu(), expected_values) and _equal_bits(q.dequantize(), fake)
                if not same:
                    yield f"fake_quantize, {spec}, {dtype}, from {skip}"


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits: -0 is not 0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_other_devices(card: Card, n: int) -> list[str]:
    """Tensors of another card than the current one are quantized there. With one card nothing can be checked."""
    return [
        f"{other.device}: {wrong}"
        for other in card.list_others()
        for wrong in (*_find_public_differences(other, n), *_find_wrong_step(other))
    ]


def _find_wrong_step(card: Card) -> list[str]:
    return state_cases.find_wrong_steps(card.put, card.get, [case for case in READY_STEPS if case[0] == ADAM])


def check_illegal_access(card: Card, _: int) -> list[str]:
    """With CUDA_LAUNCH_BLOCKING=1 the error of a kernel that reads what is not there names it."""
    if not card.is_real:
        return []
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, __file__, "--illegal"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    named = "CUDA kernel encode" in done.stderr and done.returncode != 0
    return [] if named else [f"exit code {done.returncode}: {done.stderr[-2000:]}"]


def read_what_is_not_there() -> None:
    """Quantize a tensor of 2^28 blocks with the scale of one."""
    x, one = torch.zeros(1 << 28, dtype=torch.float16, device="cuda"), torch.ones(1, device="cuda")
    codebook = make_codebook("int", 4)
    kernels.quantize(x, one, one, codebook, decision_thresholds(codebook), x.numel(), 1)


TORCH_CHECKS: dict[str, Callable[[Card, int], list[str]]] = {
    "a side stream": check_side_stream,
    "public functions, and views": check_public_functions,
    "other devices": check_other_devices,
    "an error names its kernel": check_illegal_access,
}


def summarize(rows: list[dict[str, object]]) -> Iterator[str]:
    """Yield what a reader wants to know."""
    wrong = [str(row["case"]) for row in rows if row["wrong"]]
    noted = [f"{row['case']}: {row['note']}" for row in rows if "note" in row]
    made = len(rows) - len(noted)
    yield f"{made - len(wrong)} of {made} checks are right"
    yield from noted
    yield from (f"wrong: {name}" for name in wrong)


if __name__ == "__main__":  # for compute-sanitizer: a few cases, in this process
    if "--illegal" in sys.argv:
        read_what_is_not_there()
        sys.exit()
    chosen = Card(torch.device("cuda", 0))
    found = {name: check_case(name, chosen) for name in (*READY_CASES, *GROUPS)}
    sys.exit("\n".join(f"{name}: {wrong}" for name, wrong in found.items() if wrong))
