"""Makes invented results for tests of the store."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from pathlib import Path

from kbit.evaluation.measurement import Measurement, encode_items
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.store import Store

QUANTS = (
    QuantConfig(bits=16),
    QuantConfig(data_type="float", bits=3, exponent_bits=2, centering=True),
    QuantConfig(data_type="nf", block_size=None, exclude="mlp"),
    QuantConfig(data_type="int", scale_format="bf16", rounding="stochastic", seed=3),
)


def make_result(number: int, value: float = 0.5) -> Result:
    """Return an invented result. Successive numbers go through the quantizers in QUANTS."""
    experiment = Experiment(ModelConfig(f"toy-{number}"), QUANTS[number % len(QUANTS)])
    measurements = (
        Measurement("nano_cloze", "acc", value, 0.4, 0.6, 100),
        Measurement("nano_held_out", "cross_entropy", 3.0 + number, float("nan"), float("nan"), 1),
    )
    return Result(
        key=find_key(experiment), experiment=experiment, family="toys", architecture="Toy", parameters=1000,
        quantized_parameters=900, total_bits=5425, bits_per_param=4.25, coverage=1.0, skipped=(),
        measurements=measurements, model_revision="0", checkpoint_dtype="float16", weights_hash="0", tasks=(),
        text=None, truncated=0, versions={"python": "3.11"}, git_commit="", device="none", threads=1,
        seconds_quantize=0.1, seconds_evaluate=0.2, peak_memory_bytes=1, finished="2026-01-01T00:00:00+00:00",
        items=(encode_items("nano_cloze", "acc", [1.0, float(number % 2)]),),
        weight_rmse=None if number % 3 else 0.1,
    )  # fmt: skip


def path_of(store: Store, number: int, kind: str = "experiments") -> Path:
    """Return the file of an invented result."""
    return store.path / kind / f"{make_result(number).key}.json"


def fill(path: Path | str, numbers: range) -> Store:
    """Write the results of these numbers and return their store."""
    store = Store(path)
    for number in numbers:
        store.write(make_result(number))
    return store


def write_and_compact(path: Path, start: int) -> None:
    """Write 60 results and compact the store now and then, as one of several drivers does."""
    for number in range(start, start + 60):
        store = Store(path)
        store.write(make_result(number))
        if number % 7 == 0:
            store.compact()


def race(path: Path, value: float, start: Barrier) -> None:
    """Write 50 results as soon as the other process is there too. Each of two writers runs this function."""
    store = Store(path)
    start.wait(timeout=120)
    for number in range(50):
        store.write(make_result(number, value))
