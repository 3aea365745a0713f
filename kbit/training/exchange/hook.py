"""The exchange of quantized gradients between processes: a communication hook of DistributedDataParallel.

Start the processes by torchrun or Ray Train, call torch.distributed.init_process_group, wrap the model, and register:

    model = DistributedDataParallel(model)
    exchange = register_exchange(model, QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32"))

All replicas decode the same bytes, so their parameters stay equal bit for bit. Of torch's own hooks, fp16_compress runs
on gloo, and PowerSGD if every parameter is used. bf16_compress asks for NCCL.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kbit.layers.run_time.transient import with_own_seed
from kbit.numerics.spec import QuantSpec
from kbit.training.exchange.replicas import Exchange, Replica
from kbit.training.exchange.wire import Bytes, check_sent, count_sent_bytes, decode, encode


class _State:
    """What the hook is called with: this process' replica, the parameters' names by their id, and the processes."""

    def __init__(self, replica: Replica, names: dict[int, str], group: Any) -> None:
        self.replica, self.names, self.group = replica, names, group


# torch asks for these very types here, which annotations that are strings are not: this file imports no annotations
def _exchange_bucket(state: _State, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Put the mean gradients into a bucket's buffer. The result is there at once: nothing overlaps."""
    replica = state.replica
    if replica.exchange.replicas > 1:
        gradients = bucket.gradients()
        names = [state.names[id(parameter)] for parameter in bucket.parameters()]
        exchange = _gather if replica.exchange.form == "all_gather" else _shoot_twice
        means = exchange(state, names, [gradient.reshape(-1).float() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
    if bucket.is_last():
        replica.step += 1
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def register_exchange(
    model: DistributedDataParallel,
    spec: QuantSpec | None,
    *,
    form: str = "all_gather",
    error_feedback: bool = False,
) -> Replica:
    """Let a model's replicas exchange quantized gradients, and return this process' one, which counts its bytes.

    Args:
        model: the model on the CPU.
        spec: the quantizer of a gradient, flattened. None sends float32 numbers.
        form: all_gather or two_shot, see kbit.training.exchange.replicas.
        error_feedback: whether the rounding error of a gradient is added to the next one.

    Raises:
        ValueError: there is no process group, a parameter is not on the CPU, or see Exchange.
    """
    check_group()
    named = dict(model.module.named_parameters())
    if elsewhere := next((name for name, parameter in named.items() if parameter.device.type != "cpu"), None):
        raise ValueError(f"{elsewhere} is on {named[elsewhere].device}: gradients are exchanged on the CPU")
    group = model.process_group  # all processes, or those that the model was wrapped for
    exchange = Exchange(spec, dist.get_world_size(group), form, error_feedback)
    replica = Replica(exchange, dist.get_rank(group))
    names = {id(parameter): name for name, parameter in named.items()}
    model.register_comm_hook(_State(replica, names, group), _exchange_bucket)
    return replica


def send_values(values: Tensor, spec: QuantSpec | None, to: int, where: str) -> int:
    """Send a tensor to another process, such as activations to the next stage of a pipeline, and return its bytes.

    Args:
        values: the tensor, on the CPU.
        spec: its quantizer. None, or 16 bits, sends float32.
        to: the number of the process that calls receive_values.
        where: the place and the use, such as gpt_neox.layers.0/activations/7. Messages name it, and stochastic
            rounding draws its random numbers by it: another use needs another one.

    Raises:
        ValueError: there is no process group, or the quantizer has to be fitted to the values.
    """
    check_group()
    spec = check_sent(where, spec)
    data = encode(values, None if spec is None else with_own_seed(spec, where), where)
    dist.send(data, to)
    return len(data)


def receive_values(shape: tuple[int, ...], spec: QuantSpec | None, source: int) -> Tensor:
    """Return the float32 tensor that another process sends by send_values, with the same quantizer.

    Raises:
        ValueError: see send_values.
    """
    check_group()
    spec = check_sent("the values to receive", spec)
    data = torch.empty(count_sent_bytes(shape, spec), dtype=torch.uint8)
    dist.recv(data, source)
    return decode(data, shape, spec)


def check_group() -> None:
    """Raise ValueError unless processes can talk to each other."""
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed: simulate the exchange in one process")
    if not dist.is_initialized():
        raise ValueError(
            "an exchange between processes needs a process group: start them by torchrun and call "
            "torch.distributed.init_process_group('gloo'), or simulate the exchange in one process"
        )


def _gather(state: _State, names: list[str], gradients: list[Tensor]) -> list[Tensor]:
    replica = state.replica
    data = torch.cat([replica.encode(g, name, 0, 0) for name, g in zip(names, gradients, strict=True)])
    everyones = [torch.empty_like(data) for _ in range(replica.exchange.replicas)]
    dist.all_gather(everyones, data, state.group)
    replica.sent += len(data) * (replica.exchange.replicas - 1)
    return _average(replica, everyones, [gradient.numel() for gradient in gradients])


def _shoot_twice(state: _State, names: list[str], gradients: list[Tensor]) -> list[Tensor]:
    replica, exchange = state.replica, state.replica.exchange
    parts = [exchange.find_parts(gradient.numel()) for gradient in gradients]
    named = list(zip(names, gradients, parts, strict=True))
    to_owners = [
        torch.cat([replica.encode(gradient[places[owner]], name, 0, owner) for name, gradient, places in named])
        for owner in range(exchange.replicas)
    ]
    lengths = [[places[owner].stop - places[owner].start for places in parts] for owner in range(exchange.replicas)]
    own = _send_to_each(state, to_owners, [_count_all(lengths[replica.number], exchange)] * exchange.replicas)
    means = _average(replica, own, lengths[replica.number])
    data = torch.cat([replica.encode(m, name, 1, replica.number) for name, m in zip(names, means, strict=True)])
    sizes = [_count_all(of_owner, exchange) for of_owner in lengths]
    from_owners = _send_to_each(state, [data] * exchange.replicas, sizes)
    decoded = [_decode_all(d, of_owner, exchange) for d, of_owner in zip(from_owners, lengths, strict=True)]
    return [torch.cat(of_parameter) for of_parameter in zip(*decoded, strict=True)]


def _send_to_each(state: _State, data: list[Bytes], sizes: list[int]) -> list[Bytes]:
    """Send each process its bytes, and return what each of them sent here, of these sizes."""
    replica, received = state.replica, torch.empty(sum(sizes), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(data), sizes, [len(part) for part in data], state.group)
    replica.sent += sum(len(part) for number, part in enumerate(data) if number != replica.number)
    return list(received.split(sizes))  # type: ignore[no-untyped-call]


def _average(replica: Replica, everyones: list[Bytes], lengths: list[int]) -> list[Tensor]:
    sizes = [_count_all([length], replica.exchange) for length in lengths]
    of_parameters = zip(*(data.split(sizes) for data in everyones), strict=True)  # type: ignore[no-untyped-call]
    return [replica.average(data, length) for data, length in zip(of_parameters, lengths, strict=True)]


def _decode_all(data: Bytes, lengths: list[int], exchange: Exchange) -> list[Tensor]:
    parts = data.split([_count_all([length], exchange) for length in lengths])  # type: ignore[no-untyped-call]
    return [
        decode(part, (length,), exchange.spec) if length else torch.empty(0)
        for part, length in zip(parts, lengths, strict=True)
    ]


def _count_all(lengths: list[int], exchange: Exchange) -> int:
    return sum(count_sent_bytes((length,), exchange.spec) for length in lengths if length)
