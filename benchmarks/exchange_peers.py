"""Exchanges of gradients beside torch's own communication hooks: the loss, the bytes and the time of the same training.

    python benchmarks/exchange_peers.py [--steps 200] [--seeds 3]

Takes about five minutes. Two processes on gloo, of one thread each, train nano-neox-98k from random weights by
DistributedDataParallel, with the recipe of the study nano/exchange. All ways draw the same batches. The loss is the
mean of the last tenth of the steps, and a difference is paired by seed. Bytes are what a process hands over for each
parameter and step. Those of torch's exchanges are counted as a ring of two processes sends them: the float32 gradient
once, or what fp16_compress and PowerSGD make of it. The time is that of a step's clock beside plain averaging in the
same run, the median over seeds. Writes benchmarks/results/exchange_peers.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from kbit.analysis.curves.trainings import describe_seeds
from kbit.data.texts import read_documents
from kbit.models.loading import load_model
from kbit.numerics.spec import QuantSpec
from kbit.training.batches import Tokens, draw_batch, split_text, tokenize_stream
from kbit.training.config import TrainConfig
from kbit.training.exchange.hook import register_exchange
from kbit.training.loop import Recipe, State, take_step
from kbit.training.optimizers import make_optimizer
from kbit.training.trainer import randomize

RESULTS: Final = Path(__file__).parent / "results" / "exchange_peers.json"
MODEL: Final = "nano-neox-98k"
PROCESSES: Final = 2
CONTEXT: Final = 256
CONFIG: Final = TrainConfig(start="random", lr=4e-3, weight_decay=0.1)
LATE: Final = 10  # steps before PowerSGD begins
PLAIN: Final = "torch float32"
EIGHT: Final = QuantSpec(bits=8, data_type="dynamic", block_size=256, scale_format="fp32")
Count = Callable[[], float]  # bytes that a process has handed over so far


def average_plainly(model: DistributedDataParallel, steps: Count) -> Count:
    return lambda: 4 * count_parameters(model) * steps()


def compress_to_fp16(model: DistributedDataParallel, steps: Count) -> Count:
    model.register_comm_hook(None, fp16_compress_hook)
    return lambda: 2 * count_parameters(model) * steps()


def use_power_sgd(model: DistributedDataParallel, steps: Count, *, rank: int) -> Count:
    """Use PowerSGD from the tenth step on, as its documentation advises to start late."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=LATE)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def count() -> float:
        _, _, numbers = state.compression_stats()
        return 4 * (numbers + min(LATE, steps()) * count_parameters(model))

    return count


def exchange_bits(model: DistributedDataParallel, steps: Count, *, bits: int, feedback: bool = False) -> Count:
    replica = register_exchange(model, replace(EIGHT, bits=bits), error_feedback=feedback)
    return lambda: replica.sent


WAYS: Final[dict[str, tuple[Callable[..., Count], dict[str, Any]]]] = {
    PLAIN: (average_plainly, {}),
    "torch fp16_compress": (compress_to_fp16, {}),
    "torch PowerSGD rank 1": (use_power_sgd, {"rank": 1}),
    "torch PowerSGD rank 4": (use_power_sgd, {"rank": 4}),
    "kbit 8 bits": (exchange_bits, {"bits": 8}),
    "kbit 4 bits": (exchange_bits, {"bits": 4}),
    "kbit 4 bits, error feedback": (exchange_bits, {"bits": 4, "feedback": True}),
    "kbit 3 bits": (exchange_bits, {"bits": 3}),
}


def count_parameters(model: DistributedDataParallel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train(number: int, port: int, steps: int, seeds: int, out: str) -> None:
    """Train with every way and seed in one process, and write what the first process has seen."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=PROCESSES)
    loaded = load_model(MODEL)
    documents, _ = read_documents(CONFIG.text)
    stream = split_text(
        tokenize_stream(documents, loaded.tokenizer), batch_size=CONFIG.batch_size, context=CONTEXT, name=CONFIG.text
    ).stream
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for way in WAYS:
            found.setdefault(way, []).append(train_once(loaded.model, stream, way, seed, steps, number))
    if number == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def train_once(module: Any, stream: Tokens, way: str, seed: int, steps: int, number: int) -> dict[str, float]:
    """Return the loss, the bytes for each parameter and step, and the median seconds of a step."""
    randomize(module, seed)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    model = DistributedDataParallel(module.train())
    state = State(model, make_optimizer(replace(CONFIG, seed=seed), module))
    register, options = WAYS[way]
    count = register(model, lambda: state.step, **options)
    recipe = Recipe(
        steps, CONFIG.lr, CONFIG.batch_size, CONTEXT, seed, CONFIG.warm_up, CONFIG.last_lr, CONFIG.clip, autocast=None
    )
    losses, seconds = [], []
    for step in range(steps):
        batch = draw_batch(stream, step, seed=seed, batch_size=CONFIG.batch_size, context=CONTEXT)
        start = time.perf_counter()
        loss = torch.tensor(take_step(state, batch[number::PROCESSES], recipe))
        seconds.append(time.perf_counter() - start)
        dist.all_reduce(loss)
        losses.append(float(loss) / PROCESSES)
    last = losses[-max(1, steps // 10) :]
    sent = count() / count_parameters(model) / steps
    return {"loss": statistics.fmean(last), "bytes": sent, "seconds": statistics.median(seconds)}


def summarize(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return for each way what it adds to plain averaging, with the interval over seeds, its bytes and its time."""
    import pandas as pd

    rows = {}
    for way, seeds in found.items():
        pairs = list(zip(seeds, found[PLAIN], strict=True))
        mean, low, high = describe_seeds(pd.Series([own["loss"] - plain["loss"] for own, plain in pairs]))
        rows[way] = {
            "loss": statistics.fmean(own["loss"] for own in seeds),
            "added": mean,
            "low": low,
            "high": high,
            "bytes": statistics.fmean(own["bytes"] for own in seeds),
            "time": statistics.median(own["seconds"] / plain["seconds"] for own, plain in pairs),
        }
    return rows


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, out = free.getsockname()[1], Path(folder) / "found.json"
        free.close()
        mp.spawn(train, (port, options.steps, options.seeds, str(out)), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
        found = json.loads(out.read_text())
    rows = summarize(found)
    print(f"{'exchange':28} {'nats added':>10} {'95% interval':>20} {'bytes':>7} {'time':>6}")
    for way, row in rows.items():
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        print(f"{way:28} {row['added']:+10.4f} {interval:>20} {row['bytes']:7.3f} {row['time']:5.2f}x")
    record = {
        "model": MODEL,
        "steps": options.steps,
        "seeds": options.seeds,
        "processes": PROCESSES,
        "ways": rows,
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numba")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
