"""The store at the size of the paper's study, 35,000 experiments: reading, planning and compacting it.

    python benchmarks/sweep.py [--experiments 100000]

Each size has its part of benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

RECORD: Final = Path(__file__).parent / "results" / "sweep.json"


def measure_store(experiments: int) -> dict[str, Any]:
    """Return the seconds that reading, planning and compacting a store of so many experiments take.

    Each record is the same real result, with its items and ten of its measurements, under the key of an experiment of a
    grid.
    """
    from kbit.engine.plan import make_plan
    from kbit.experiments.identity import find_key
    from kbit.store.readers import list_keys, read_results
    from kbit.store.store import Store

    grid = list(make_grid(experiments))
    record = _run_one(grid[0])
    print(f"a record of {len(json.dumps(record, indent=1)):,} bytes", flush=True)
    seconds: dict[str, Any] = {"experiments": experiments, "measurements": len(record["measurements"])}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for experiment in grid:
            key = find_key(experiment)
            mine = {"key": key, "experiment": _as_json(experiment), "items": _shuffle(record["items"])}
            text = json.dumps(record | mine, indent=1)
            (Path(folder) / "experiments" / f"{key}.json").write_text(text)
        seconds["plan of files"] = _time(lambda: make_plan(grid, folder))
        seconds["read files"] = _time(lambda: read_results(folder))
        seconds["compact"] = _time(store.compact)
        seconds["plan compacted"] = _time(lambda: make_plan(grid, folder))
        seconds["keys compacted"] = _time(lambda: list_keys(folder))
        seconds["read compacted"] = min(_time(lambda: read_results(folder)) for _ in range(3))
        seconds["rows"] = len(read_results(folder))
        seconds["MiB compacted"] = sum(f.stat().st_size for f in Path(folder).rglob("*.parquet")) / 2**20
    return seconds


def make_grid(count: int) -> Iterator[Any]:
    """Yield so many distinct experiments."""
    from kbit.evaluation.config import EvalConfig
    from kbit.experiments.config import Experiment
    from kbit.methods.config import QuantConfig
    from kbit.models.config import ModelConfig

    for number in range(count):
        quant = QuantConfig(bits=3 + number % 6, data_type=("int", "nf")[number // 6 % 2], block_size=1 + number // 12)
        yield Experiment(ModelConfig("nano-neox-98k"), quant, EvalConfig(limit=100, perplexity_windows=16))


def _run_one(experiment: Any) -> dict[str, Any]:
    """Run an experiment and return its record with ten of its measurements."""
    import dataclasses

    from kbit.experiments.session import run_experiment
    from kbit.silence import silence_libraries

    silence_libraries()
    record = json.loads(json.dumps(dataclasses.asdict(run_experiment(experiment)) | {"schema_version": 1}))
    return record | {"measurements": record["measurements"][:10]}


def _shuffle(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items with as many random bytes, which compress as real ones would."""
    return [
        item | {"data": base64.b64encode(os.urandom(len(base64.b64decode(item["data"])))).decode()} for item in items
    ]


def _as_json(experiment: Any) -> Any:
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    print(f"{time.perf_counter() - start:.2f} s", flush=True)
    return time.perf_counter() - start


def _save(name: str, measured: Any) -> None:
    """Write a part of the record to its place."""
    RECORD.parent.mkdir(exist_ok=True)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[name] = {"cpus": os.cpu_count(), "machine": platform.machine(), "measured": measured}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record[name], indent=1))


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=35_000, help="in the store (default: 35,000)")
    arguments = parser.parse_args()
    _save(f"store of {arguments.experiments:,}", measure_store(arguments.experiments))


if __name__ == "__main__":
    main()
