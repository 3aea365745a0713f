"""Quantized gradients on the wire: simulated in one process, and between two that run on gloo."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import exchange_processes as processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from exchange_processes import DYNAMIC, EXCHANGES, STEPS, WIRE, make_model, train_simulated
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.numerics.spec import NORMALIZATIONS, QuantSpec
from kbit.training.config import EXCHANGE_FORMS
from kbit.training.exchange.hook import check_group, register_exchange
from kbit.training.exchange.pipeline import cut_pipeline
from kbit.training.exchange.replicas import Exchange, SimulatedExchange
from kbit.training.exchange.wire import check_sent, count_sent_bytes, decode, encode

PARAMETERS: Final = sum(p.numel() for p in make_model().parameters())


@dataclasses.dataclass(frozen=True)
class Ended:
    """What two processes wrote, and how the job ended when one of them was killed."""

    found: list[dict[str, Any]]
    error: Exception
    seconds: float


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("exchange")
    start = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)) as error:
        spawn(processes.run_process, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    return Ended(found, error.value, time.monotonic() - start)


@pytest.fixture(scope="module")
def simulated() -> dict[str, tuple[nn.Module, SimulatedExchange]]:
    return {name: train_simulated(exchange) for name, exchange in EXCHANGES.items()}


def assert_equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("name", EXCHANGES)
def test_replicas_stay_equal_and_equal_the_simulation(
    name: str, ended: Ended, simulated: dict[str, tuple[nn.Module, SimulatedExchange]]
) -> None:
    """Bit for bit after 50 steps, with unused parameters, accumulated gradients and buckets that were rebuilt."""
    first, second = (found[name] for found in ended.found)
    assert_equal_weights(first["weights"], second["weights"])
    model, exchange = simulated[name]
    assert_equal_weights(first["weights"], model.state_dict())
    assert [first["sent"], second["sent"]] == [replica.sent for replica in exchange.replicas]


def test_a_model_exchanges_within_its_own_group(ended: Ended) -> None:
    """Each of the two processes has a group of its own here, so that nothing is sent and nothing is averaged."""
    for rank, found in enumerate(ended.found):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            for number in range(processes.count_batches(step)):
                processes.lose(model, step, rank, number).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        assert found["alone"]["sent"] == 0
        assert_equal_weights(found["alone"]["weights"], model.state_dict())


def test_what_has_to_be_fitted_is_not_sent() -> None:
    with pytest.raises(ValueError, match="inner/activations/0: data_type=quantile is fitted to a tensor"):
        check_sent("inner/activations/0", QuantSpec(data_type="quantile"))
    assert check_sent("x", QuantSpec(bits=16)) is None


def test_a_killed_process_ends_the_job_with_a_reason(ended: Ended) -> None:
    reason = str(ended.error)
    assert "signal SIGKILL" in reason or "Connection closed by peer" in reason or "onnection reset" in reason, reason


def test_stages_in_two_processes_compute_what_a_cut_in_one_does(ended: Ended) -> None:
    """The random numbers of stochastic rounding are the same, too, and others in the next use."""
    model = make_model()
    with cut_pipeline(model, "inner", WIRE, DYNAMIC) as cut:
        processes.lose(model, 0, 0, 0).backward()  # type: ignore[no-untyped-call]
        values = torch.full((64,), 0.3).index_fill(0, torch.tensor(0), 1.0)
        first, again, second = (cut.transfer(values, "activations", use) for use in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    expected = [*model.inner.parameters(), *model.experts[0].parameters()]
    found = [gradient for of_stage in ended.found for gradient in of_stage["stage"]]
    assert all(torch.equal(gradient, p.grad) for gradient, p in zip(found, expected, strict=True) if p.grad is not None)
    assert len(found) == 2


def test_one_process_is_the_identity() -> None:
    """Nothing is sent, so nothing is quantized."""
    model, plain = make_model(), make_model()
    exchange = SimulatedExchange(dict(model.named_parameters()), Exchange(DYNAMIC, 1))
    for net in (model, plain):
        processes.lose(net, 0, 0, 0).backward()  # type: ignore[no-untyped-call]
    exchange.collect(0)
    assert all(p.grad is None for p in model.parameters())
    exchange.average()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert (left.grad is None and right.grad is None) or torch.equal(left.grad, right.grad)  # type: ignore[arg-type]
    assert exchange.sent_per_param == 0


@pytest.mark.parametrize("form", EXCHANGE_FORMS)
def test_mean_gradient_by_hand(form: str) -> None:
    """Whole-tensor int of 2 bits has -1, 0 and 1 times the largest magnitude. In the second shot the mean is rounded.

    replica 0    4   1  -3      becomes   4   0  -4
    replica 1    0   2   0      becomes   0   2   0
    mean                                  2   1  -2,  and 1 is a tie that goes away from 0
    """
    parameter = nn.Parameter(torch.zeros(3))
    spec = QuantSpec(bits=2, data_type="int", block_size=3, scale_format="fp32")
    exchange = SimulatedExchange({"p": parameter}, Exchange(spec, 2, form))
    for number, gradient in enumerate(([4.0, 1.0, -3.0], [0.0, 2.0, 0.0])):
        parameter.grad = torch.tensor(gradient)
        exchange.collect(number)
    exchange.average()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == ([2.0, 1.0, -2.0] if form == "all_gather" else [2.0, 2.0, -2.0])


def test_error_feedback_by_hand() -> None:
    """What rounding lost comes with the next gradient: 1 of 4 is lost at first, and the sum of three arrives as 2."""
    parameter = nn.Parameter(torch.zeros(2))
    spec = QuantSpec(bits=2, data_type="int", block_size=None, scale_format="fp32")
    exchange = SimulatedExchange({"p": parameter}, Exchange(spec, 2, error_feedback=True))
    arrived = []
    for _ in range(3):
        for number in range(2):
            parameter.grad = torch.tensor([4.0, 1.0])
            exchange.collect(number)
        exchange.average()
        assert parameter.grad is not None
        arrived.append(parameter.grad.tolist())
    assert arrived == [[4.0, 0.0], [4.0, 4.0], [4.0, 0.0]]  # 2 is a tie. Then 2 - 4 + 1 = -1 goes to 0
    assert [replica.residuals["p/0/0"].tolist() for replica in exchange.replicas] == [[0.0, -1.0]] * 2


@pytest.mark.parametrize(("replicas", "one_shot", "two_shots"), [(2, 1, 1), (4, 3, 1.5), (8, 7, 1.75)])
def test_bytes_that_a_replica_hands_over(replicas: int, one_shot: float, two_shots: float) -> None:
    """(n - 1) and 2 (n - 1) / n times the bytes of a quantized parameter, 8 + 32 / 256 bits here."""
    parameter = nn.Parameter(torch.zeros(256 * 16))
    for form, copies in zip(EXCHANGE_FORMS, (one_shot, two_shots), strict=True):
        exchange = SimulatedExchange({"p": parameter}, Exchange(DYNAMIC, replicas, form))
        for number in range(replicas):
            parameter.grad = torch.ones(256 * 16)
            exchange.collect(number)
        exchange.average()
        assert exchange.sent_per_param == copies * (1 + 4 / 256)


def test_float32_in_two_shots_sends_what_a_ring_does(
    simulated: dict[str, tuple[nn.Module, SimulatedExchange]],
) -> None:
    """With 2 replicas, 4 bytes for each parameter in each form. The mean is that of torch."""
    model, exchange = simulated["float32"]
    assert exchange.sent_per_param == 4
    assert exchange.replicas[0].sent == 4 * STEPS * PARAMETERS  # unused ones as well
    plain = make_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        for replica in range(2):
            for number in range(processes.count_batches(step)):
                (processes.lose(plain, step, replica, number) / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(7, 83), (1,), (300,)], ids=str)
def test_bytes_decode_to_what_was_quantized(shape: tuple[int, ...], normalization: str, scale_format: str) -> None:
    if scale_format == "e8m0" and normalization != "absmax":
        return  # refused: it has neither sign nor fraction
    for bits, centering in ((3, True), (5, False)):
        spec = QuantSpec(
            bits=bits, data_type="int", block_size=48, scale_format=scale_format, normalization=normalization,
            centering=centering,
        )  # fmt: skip
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        data = encode(x, spec, "x")
        assert len(data) == count_sent_bytes(shape, spec)
        assert torch.equal(decode(data, shape, spec), fake_quantize(x, spec))
    assert torch.equal(decode(encode(x, None, "x"), shape, None), x)


def test_a_checkpoint_goes_on_with_the_same_numbers() -> None:
    """Residuals and the number of steps are kept, so that stochastic rounding goes on as it would have."""
    model = make_model()
    exchange = EXCHANGES["3 bits, two shots, feedback"]

    def run(simulated: SimulatedExchange, steps: range) -> list[torch.Tensor]:
        for step in steps:
            model.zero_grad()
            for replica in range(2):
                processes.lose(model, step, replica, 0).backward()  # type: ignore[no-untyped-call]
                simulated.collect(replica)
            simulated.average()
        return [p.grad for p in model.parameters() if p.grad is not None]

    parameters = dict(model.named_parameters())
    first, again = SimulatedExchange(parameters, exchange), SimulatedExchange(parameters, exchange)
    run(first, range(2))
    state = copy.deepcopy(first.state_dict())
    expected = run(first, range(2, 4))
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(again, range(2, 4)), expected, strict=True))
    assert again.sent_per_param == first.sent_per_param


def test_a_cut_model_computes_with_what_arrives(build_tiny: Callable[..., Any]) -> None:
    model, tokens = build_tiny("gpt_neox"), torch.arange(40).view(2, 20)
    plain = model(tokens).logits
    with cut_pipeline(model, "gpt_neox.layers.0", None, QuantSpec(bits=16)) as cut:
        assert torch.equal(model(tokens).logits, plain)
        assert cut.sent == 4 * 2 * 20 * 64
    seen: list[torch.Tensor] = []
    layer = model.gpt_neox.layers[1]
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with cut_pipeline(model, "gpt_neox.layers.0", DYNAMIC, DYNAMIC) as cut:
        model(tokens, labels=tokens).loss.backward()
    assert cut.sent == 2 * 2 * 20 * 64 * (1 + 4 / 256)  # there and back
    model(tokens)
    handle.remove()
    assert torch.equal(seen[0], fake_quantize(seen[1].detach(), DYNAMIC))


def test_bad_exchanges() -> None:
    with pytest.raises(ValueError, match="form='ring' is not one of: all_gather, two_shot"):
        Exchange(DYNAMIC, 2, "ring")
    with pytest.raises(ValueError, match="replicas=0 is not >= 1"):
        Exchange(DYNAMIC, 0)
    with pytest.raises(ValueError, match="exchange: data_type=quantile is fitted to a tensor"):
        Exchange(QuantSpec(data_type="quantile", scale_format="fp32"), 2)
    with pytest.raises(ValueError, match="exchange: scale_format=fp16 ends at 6e-8"):
        Exchange(QuantSpec(), 2)
    with pytest.raises(ValueError, match="after='layers' is no module"):
        cut_pipeline(make_model(), "layers", DYNAMIC, DYNAMIC)
    exchange = SimulatedExchange(dict(make_model().named_parameters()), Exchange(DYNAMIC, 2))
    exchange.collect(1)
    with pytest.raises(ValueError, match=r"replica 1 is not one of 2, or is collected: \[1\]"):
        exchange.collect(1)
    with pytest.raises(ValueError, match="1 of 2 replicas are collected"):
        exchange.average()


def test_an_exchange_between_processes_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"start them by torchrun and call torch\.distributed\.init_process_group"):
        check_group()
    with pytest.raises(ValueError, match="needs a process group"):
        register_exchange(make_model(), DYNAMIC)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_named() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    exchange = SimulatedExchange({"p": parameter}, Exchange(DYNAMIC, 2))
    for number in range(2):
        parameter.grad = torch.tensor([0.0, torch.nan, 1.0])
        exchange.collect(number)
    with pytest.raises(FloatingPointError, match=r"the gradient of p in exchange 0: 1 of 3 values are NaN or Inf"):
        exchange.average()
