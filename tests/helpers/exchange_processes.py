"""Processes that train replicas of a small model on gloo, and the same training in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kbit.numerics.spec import QuantSpec
from kbit.training.exchange.hook import receive_values, register_exchange, send_values
from kbit.training.exchange.replicas import Exchange, SimulatedExchange

STEPS: Final = 50
REPLICAS: Final = 2
DYNAMIC: Final = QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32")
WIRE: Final = QuantSpec(bits=8, data_type="int", block_size=16, scale_format="bf16", rounding="stochastic")
# Name of a training -> its exchange
EXCHANGES: Final = {
    "float32": Exchange(None, REPLICAS, "two_shot"),
    "8 bits": Exchange(DYNAMIC, REPLICAS),
    "3 bits, two shots, feedback": Exchange(
        QuantSpec(bits=3, block_size=16, scale_format="bf16", rounding="stochastic"), REPLICAS, "two_shot", True
    ),
}


class Model(nn.Module):
    """A small model. The first expert sees even steps alone, the second one odd steps. One parameter has no use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 20, bias=False)
        self.experts = nn.ModuleList([nn.Linear(20, 7, bias=False) for _ in range(2)])
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, step: int) -> Any:
        return self.experts[step % 2](torch.tanh(self.inner(x)))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def draw(step: int, replica: int, number: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a micro-batch, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * replica + number)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 7, generator=generator)


def count_batches(step: int) -> int:
    """Each fifth step accumulates the gradient of two micro-batches."""
    return 2 if step % 5 == 0 else 1


def lose(model: nn.Module, step: int, replica: int, number: int) -> Tensor:
    x, y = draw(step, replica, number)
    loss: Tensor = (model(x, step) - y).square().mean()
    return loss


def train_simulated(exchange: Exchange) -> tuple[Model, SimulatedExchange]:
    """Train all replicas in this process."""
    model = make_model()
    simulated = SimulatedExchange(dict(model.named_parameters()), exchange)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        for replica in range(exchange.replicas):
            for number in range(count_batches(step)):
                lose(model, step, replica, number).backward()  # type: ignore[no-untyped-call]
            simulated.collect(replica)
        simulated.average()
        optimizer.step()
        optimizer.zero_grad()
    return model, simulated


def train_replica(
    rank: int, exchange: Exchange, steps: int = STEPS, dies_at: int | None = None, group: Any = None
) -> dict[str, Any]:
    """Train this process' replica, and return its weights and the bytes that it sent."""
    options: dict[str, Any] = {"find_unused_parameters": True, "bucket_cap_mb": 1e-3, "process_group": group}
    model = DistributedDataParallel(make_model(), **options)
    replica = register_exchange(model, exchange.spec, form=exchange.form, error_feedback=exchange.error_feedback)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        if step == dies_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for number, last in _numbers(step):
            with nullcontext() if last else model.no_sync():
                lose(model, step, rank, number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": model.module.state_dict(), "sent": replica.sent}


def _numbers(step: int) -> Iterator[tuple[int, bool]]:
    count = count_batches(step)
    return ((number, number == count - 1) for number in range(count))


def run_stage(rank: int) -> list[Tensor]:
    """Compute the stage of a pipeline that is this process', forward and backward. Return its gradients."""
    model = make_model()
    x, y = draw(0, 0, 0)
    if rank == 0:
        inner = model.inner(x)
        send_values(inner, WIRE, 1, "inner/activations/0")
        inner.backward(receive_values((6, 20), DYNAMIC, 1))
        parameters = model.inner.parameters()
    else:
        inner = receive_values((6, 20), WIRE, 0).requires_grad_()
        (model.experts[0](torch.tanh(inner)) - y).square().mean().backward()
        assert inner.grad is not None
        send_values(inner.grad, DYNAMIC, 0, "inner/gradients/0")
        parameters = model.experts[0].parameters()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def run_process(rank: int, folder: str) -> None:
    """Train by each exchange and run a stage, write what came of it, and let process 1 die in the middle of a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=REPLICAS)
    found: dict[str, Any] = {name: train_replica(rank, exchange) for name, exchange in EXCHANGES.items()}
    found["stage"] = run_stage(rank)
    alone = [dist.new_group([number]) for number in range(REPLICAS)]
    found["alone"] = train_replica(rank, EXCHANGES["8 bits"], 3, group=alone[rank])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    train_replica(rank, EXCHANGES["8 bits"], dies_at=3)
