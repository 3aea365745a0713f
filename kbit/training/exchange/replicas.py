"""Gradients that are quantized before replicas of a model average them (Dettmers 2016, "8-Bit Approximations for
Parallelism in Deep Learning").

n replicas compute gradients of different micro-batches, and all go on with the mean. Two forms of the exchange are

    all_gather   Each replica sends its quantized gradient to all others, and each averages what it decodes. A replica
                 sends (n - 1) b / 8 bytes a parameter, at b bits with scales.
    two_shot     Each replica owns a part of every parameter, as in a ring's all-reduce. Quantized parts go to their
                 owners, who average them, quantize the mean and send it to all. A replica sends 2 (n - 1) / n b / 8.

float32 without quantization sends 2 (n - 1) / n 4 bytes in the second form. With error feedback, what rounding lost of
a gradient is added to the next one (Seide et al. 2014), in both shots. Blocks and residuals belong to parameters, not
to the buckets of torch's DistributedDataParallel, which change after the first step.

SimulatedExchange computes what kbit.training.exchange.hook does between processes, bit for bit, in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kbit.checks import check_choice
from kbit.layers.run_time.transient import with_own_seed
from kbit.numerics.spec import QuantSpec
from kbit.training.config import EXCHANGE_FORMS
from kbit.training.exchange.wire import Bytes, check_sent, count_sent_bytes, decode, encode

Flat = Float[Tensor, " n"]


@dataclass(frozen=True)
class Exchange:
    """How replicas exchange their gradients.

    Attributes:
        spec: the quantizer of a gradient, flattened. None sends float32 numbers.
        replicas: the number of replicas. One exchanges nothing, and its gradients are not quantized.
        form: all_gather or two_shot.
        error_feedback: whether the rounding error of a gradient is added to the next one.

    Raises:
        ValueError: a value outside its allowed set, or a quantizer that gradients cannot have.
    """

    spec: QuantSpec | None = None
    replicas: int = 1
    form: str = "all_gather"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        check_choice("form", self.form, EXCHANGE_FORMS)
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas} is not >= 1")
        object.__setattr__(self, "spec", check_sent("exchange", self.spec, is_gradient=True))

    def find_parts(self, elements: int) -> list[slice]:
        """Return the part of a flat parameter that each replica owns, in whole blocks, or the whole as one part.

        Parts differ by a block at most. Those of a parameter with few blocks may be empty. With block_size=null each
        part is a block.
        """
        if self.form == "all_gather":
            return [slice(0, elements)]
        block = 1 if self.spec is None or self.spec.block_size is None else self.spec.block_size
        blocks = -(-elements // block)
        edges = [min(elements, number * blocks // self.replicas * block) for number in range(self.replicas + 1)]
        return [slice(*edge) for edge in itertools.pairwise(edges)]


@dataclass
class Replica:
    """What one replica keeps from step to step.

    Attributes:
        exchange: how gradients are exchanged.
        number: the replica's number.
        step: the number of exchanges so far, which random numbers depend on.
        residuals: what rounding lost, by the place that it belongs to.
        sent: bytes that the replica handed over to others.
    """

    exchange: Exchange
    number: int
    step: int = 0
    residuals: dict[str, Flat] = field(default_factory=dict)
    sent: int = 0

    def encode(self, values: Flat, name: str, shot: int, part: int) -> Bytes:
        """Return values as bytes for the others, with what was lost before, and keep what is lost now.

        Args:
            values: a part of a gradient, or of a mean.
            name: the parameter's name.
            shot: 0 for the replica's own gradient, 1 for the mean of all.
            part: the number of the part.
        """
        if not values.numel():
            return torch.empty(0, dtype=torch.uint8)
        values, place = values.float().cpu(), f"{name}/{shot}/{part}"
        if place in self.residuals:
            values = values + self.residuals[place]
        spec = self.exchange.spec
        own = None if spec is None else with_own_seed(spec, f"{place}/{self.step}/{self.number}")
        data = encode(values, own, f"the gradient of {name} in exchange {self.step}")
        if self.exchange.error_feedback:
            self.residuals[place] = values - decode(data, tuple(values.shape), spec)
        return data

    def average(self, data: Sequence[Bytes], elements: int) -> Flat:
        """Return the mean of what all replicas sent, added in the order of their numbers."""
        total = torch.zeros(elements)
        for sent in data if elements else ():
            total += decode(sent, (elements,), self.exchange.spec)
        return total / len(data)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the same numbers."""
        return {"step": self.step, "residuals": dict(self.residuals), "sent": self.sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict returned."""
        self.step, self.residuals, self.sent = state["step"], dict(state["residuals"]), state["sent"]


class SimulatedExchange:
    """Replicas of a model that are computed one after the other in one process.

    Compute each replica's gradient, collect it, and average when all are collected:

        for number, batch in enumerate(micro_batches):
            loss(batch).backward()
            exchange.collect(number)
        exchange.average()
        optimizer.step()

    Args:
        parameters: the model's trained parameters by name.
        exchange: how gradients are exchanged.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], exchange: Exchange) -> None:
        self.parameters, self.exchange = dict(parameters), exchange
        self.replicas = [Replica(exchange, number) for number in range(exchange.replicas)]
        self._gradients: dict[int, dict[str, Tensor]] = {}

    def collect(self, number: int) -> None:
        """Take the gradients of all parameters as those of a replica, and leave none behind.

        Raises:
            ValueError: there is no such replica, or it was collected already in this step.
        """
        if number not in range(self.exchange.replicas) or number in self._gradients:
            collected = sorted(self._gradients)
            raise ValueError(f"replica {number} is not one of {self.exchange.replicas}, or is collected: {collected}")
        self._gradients[number] = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None

    def average(self) -> None:
        """Give each parameter the mean gradient. One that a replica did not use is exchanged with a gradient of 0.

        A parameter that no replica used keeps none, but costs its bytes, as it does in DistributedDataParallel.

        Raises:
            ValueError: a replica was not collected.
            FloatingPointError: a gradient holds NaN or Inf.
        """
        if len(self._gradients) < self.exchange.replicas:
            raise ValueError(f"{len(self._gradients)} of {self.exchange.replicas} replicas are collected")
        gradients = [self._gradients[number] for number in range(self.exchange.replicas)]
        self._gradients = {}
        for name, parameter in self.parameters.items():
            found = [of_replica.get(name) for of_replica in gradients]
            if self.exchange.replicas == 1:
                parameter.grad = found[0]
                continue
            own = [torch.zeros_like(parameter) if gradient is None else gradient for gradient in found]
            mean = self._exchange(name, [gradient.reshape(-1) for gradient in own]).view_as(parameter)
            parameter.grad = mean if any(gradient is not None for gradient in found) else None
        for replica in self.replicas:
            replica.step += 1

    @property
    def sent_per_param(self) -> float:
        """Bytes that a replica hands over in a step for each parameter, the mean of all steps and replicas."""
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        steps = sum(replica.step for replica in self.replicas)
        return sum(replica.sent for replica in self.replicas) / steps / elements if steps else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the same numbers."""
        return {str(replica.number): replica.state_dict() for replica in self.replicas}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict returned."""
        for replica in self.replicas:
            replica.load_state_dict(state[str(replica.number)])

    def _exchange(self, name: str, gradients: list[Tensor]) -> Tensor:
        """Return the mean of flat gradients after the exchange, in their dtype and on their device."""
        means = []
        for part, place in enumerate(self.exchange.find_parts(gradients[0].numel())):
            elements = place.stop - place.start
            data = [r.encode(g[place], name, 0, part) for r, g in zip(self.replicas, gradients, strict=True)]
            mean = self.replicas[part].average(data, elements)
            if self.exchange.form == "two_shot":
                mean = self._send_mean(mean, name, part)
            self._count(part, count_sent_bytes((elements,), self.exchange.spec) if elements else 0)
            means.append(mean)
        return torch.cat(means).to(gradients[0])

    def _send_mean(self, mean: Flat, name: str, part: int) -> Flat:
        """Return the mean of a part as all decode it that the part's owner sent."""
        data = self.replicas[part].encode(mean, name, 1, part)
        return decode(data, tuple(mean.shape), self.exchange.spec) if mean.numel() else mean

    def _count(self, part: int, size: int) -> None:
        """Count the bytes of a part: to all others, or to its owner and from there to all others."""
        others = self.exchange.replicas - 1
        for replica in self.replicas:
            if self.exchange.form == "all_gather" or replica.number == part:
                replica.sent += others * size
            else:
                replica.sent += size
