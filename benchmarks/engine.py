"""The sweep engine beside other ways to run a study, its overhead and start-up, and a cluster of two Ray nodes.

    python benchmarks/engine.py [--rounds 3] [--stock-python PYTHON] [--bits 3 4] [--data-types int nf] [--limit 200]

The study is every point of models x bits x data types, on the four nano tasks alone, with two workers of one thread
each. There are four ways to run it. The first three run in turn in every round, stock once at the end:

kbit        `kbit run -m` on Ray
lm_eval     one process of lm-eval's command line for each experiment, two at a time, one thread each. Two experiments
            of each model are run, on checkpoints of quantized weights. The time to quantize and write them does not
            count. Each model's mean is scaled to the study
stock hflm  hydra-ray-launcher, whose job evaluates with lm-eval's own model class, as one would without kbit
stock       the same launcher, whose job runs the experiment as kbit's workers do (same evaluation, loaded anew)

A way's ratio is its wall time over that of kbit in the same round (stock's: over the mean of kbit's rounds). The lowest
ratio of the rounds is reported.

The stock launcher pins packages that others need newer. It therefore needs an environment of its own, with kbit's
dependencies, whose interpreter is --stock-python (default: this one). Where it is not installed, its parts are left
out. Ray's dashboard is off everywhere. lm-eval computes no bootstrap, which takes longer than the evaluation for the
perplexity of a task. All parts must find the same accuracies, up to two items of float rounding. The exit code is 1 if
they do not.

Start-up is the time from the command to the first experiment of each worker. Overhead is the wall time after that,
times the workers, less the seconds of quantizing and evaluating in the results. The two-node study runs on
ray.cluster_utils.Cluster. The node of an experiment is that of the process that has the experiment's log open. The
record is benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

from watch import Load, Watch

from kbit.data.task_files import EMBEDDED_TASKS
from kbit.evaluation.config import NANO_TASKS, EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.provenance import git_commit, package_versions
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig

RECORD: Final = Path(__file__).parent / "results" / "engine.json"
ROOT: Final = Path(__file__).parents[1]
WORKERS: Final = 2
SAMPLES: Final = 2  # processes of lm_eval for each model
BATCH_SIZE: Final = 32  # sequences of lm-eval's model class, among its best on these models: see evaluation.py
ITEMS_APART: Final = 2
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS: Final = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers give way to all other processes (nice 15) and lm_eval's do not, so that other processes would decide
    "RAY_worker_niceness": "0",
}

Accuracies = dict[str, dict[str, float]]  # experiment's name -> task -> accuracy


@dataclass(frozen=True)
class Study:
    """A grid on the nano tasks."""

    models: tuple[str, ...]
    bits: tuple[int, ...]
    data_types: tuple[str, ...]
    limit: int

    def experiments(self) -> dict[str, Experiment]:
        """Return the experiments by name. Those of a model follow each other."""
        points = product(self.models, self.bits, self.data_types)
        return {f"{m}-{b}-{d}": self._experiment(m, QuantConfig(bits=b, data_type=d)) for m, b, d in points}

    def samples(self) -> dict[str, Experiment]:
        """Return experiments of each model that differ in bits and data type, the models in turn."""
        quants = [(self.bits[i % len(self.bits)], self.data_types[i % len(self.data_types)]) for i in range(SAMPLES)]
        names = [f"{model}-{bits}-{data_type}" for bits, data_type in dict.fromkeys(quants) for model in self.models]
        return {name: self.experiments()[name] for name in names}

    def overrides(self) -> list[str]:
        """Return the study as arguments of `kbit run`."""
        grid = {"model.name": self.models, "quant.bits": self.bits, "quant.data_type": self.data_types}
        swept = [f"{key}={','.join(map(str, values))}" for key, values in grid.items()]
        return [*swept, f"eval.limit={self.limit}", "eval.perplexity=null"]

    def _experiment(self, model: str, quant: QuantConfig) -> Experiment:
        return Experiment(ModelConfig(model), quant, EvalConfig(limit=self.limit, perplexity=None))


def run_kbit(study: Study, folder: Path, *options: str, find_nodes: bool = False) -> tuple[dict[str, Any], Watch]:
    """Run the study with `kbit run`. Return what it took and the watch that saw it."""
    results = folder / "results"
    arguments = [*study.overrides(), f"ray.num_workers={WORKERS}", f"results={results}", *options]
    with Watch(results, find_nodes=find_nodes) as watch:
        start = time.perf_counter()
        call([sys.executable, "-m", "kbit", "run", "-m", *arguments], folder / "log.txt")
        wall = time.perf_counter() - start
    done = [
        json.loads(file.read_text()) for file in (results / "experiments").glob("*.json")
    ]  # too few to be compacted
    work = sum(result["seconds_quantize"] + result["seconds_evaluate"] for result in done)
    begins, ends = sorted(watch.begins.values()), sorted(watch.ends.values())
    startup = statistics.mean(begins[:WORKERS])
    overhead = WORKERS * (wall - startup) - work
    return {
        "experiments": len(done),
        "wall": wall,
        "start-up": startup,
        "quantize and evaluate": work,
        "overhead": overhead,
        "overhead / quantize and evaluate": overhead / work,
        "of it within experiments": sum(ends) - sum(begins) - work,
        "of it between, and one idle at the end": WORKERS * ends[-1] - sum(ends) + sum(begins) - sum(begins[:WORKERS]),
        "of it after the last": WORKERS * (wall - ends[-1]),
    }, watch


def read_accuracies(study: Study, results: Path) -> Accuracies:
    """Return the accuracies in a store."""
    from kbit.store.readers import read_results

    rows = read_results(results).query("metric == 'acc'")
    names = {find_key(experiment): name for name, experiment in study.experiments().items()}
    found: Accuracies = {}
    for key, task, value in rows[["key", "task", "value"]].itertuples(index=False):
        found.setdefault(names[key], {})[task] = value
    return found


def save_checkpoints(study: Study, folder: Path) -> None:
    """Write the quantized weights of the experiments that lm_eval runs, and fill the kernels' cache on disk."""
    from kbit.methods.quantize_model import quantize_model
    from kbit.models.loading import load_model

    for name, experiment in study.samples().items():
        loaded = load_model(experiment.model.name)
        quantize_model(loaded.model, experiment.quant, loaded.tokenizer)
        loaded.model.save_pretrained(folder / name)
        loaded.tokenizer.save_pretrained(folder / name)


def save_tasks(folder: Path) -> None:
    """Copy the nano tasks for lm-eval, with accuracy alone.

    Paths become absolute, because lm-eval takes relative ones from the working directory.
    """
    shutil.copy(EMBEDDED_TASKS / "preprocess.py", folder)
    for name in NANO_TASKS:
        text = (EMBEDDED_TASKS / f"{name}.yaml").read_text().replace(" data/", f" {EMBEDDED_TASKS}/data/")
        perplexity = "  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
        (folder / f"{name}.yaml").write_text(text.replace(perplexity, ""))


def run_lm_eval(names: list[str], study: Study, checkpoints: Path, tasks: Path) -> tuple[dict[str, float], Accuracies]:
    """Run lm-eval's command line on these checkpoints, two at a time. Return the seconds and accuracies of each."""

    def run(name: str) -> tuple[float, dict[str, float]]:
        model = ["--model", "hf", "--model_args", f"pretrained={checkpoints / name},dtype=float32", "--device", "cpu"]
        what = ["--tasks", ",".join(NANO_TASKS), "--include_path", str(tasks), "--limit", str(study.limit)]
        out = Path(tempfile.mkdtemp(dir=checkpoints, prefix=name))
        how = ["--batch_size", str(BATCH_SIZE), "--output_path", str(out)]
        start = time.perf_counter()
        command = [sys.executable, "-m", "lm_eval", "run", *model, *what, *how]
        call(command, checkpoints / f"{name}.txt", **ONE_THREAD)
        seconds = time.perf_counter() - start
        [file] = out.rglob("results_*.json")
        found = json.loads(file.read_text())["results"]
        return seconds, {task: found[task]["acc,none"] for task in NANO_TASKS}

    with ThreadPoolExecutor(WORKERS) as pool:
        done = dict(zip(names, pool.map(run, names), strict=True))
    return {name: seconds for name, (seconds, _) in done.items()}, {name: found for name, (_, found) in done.items()}


def run_stock(
    study: Study, evaluator: str, python: str, tasks: Path, folder: Path
) -> tuple[dict[str, Any], Accuracies]:
    """Run the study with the stock launcher."""
    out = Path(tempfile.mkdtemp(dir=folder, prefix=evaluator))
    grid = {"model": study.models, "bits": study.bits, "data_type": study.data_types}
    swept = [f"{key}={','.join(map(str, values))}" for key, values in grid.items()]
    ray = [f"+hydra.launcher.ray.init.num_cpus={WORKERS}", "+hydra.launcher.ray.init.include_dashboard=false"]
    job = [f"evaluator={evaluator}", f"limit={study.limit}", f"tasks={tasks}", f"batch_size={BATCH_SIZE}"]
    where = [f"out={out}", f"hydra.sweep.dir={folder / 'hydra'}", f"hydra.run.dir={folder / 'hydra'}"]
    script = str(ROOT / "benchmarks" / "stock_launcher.py")
    start, clock = time.perf_counter(), time.time()
    call([python, script, "-m", *swept, *job, *ray, *where], folder / f"{out.name}.txt")
    wall = time.perf_counter() - start
    done = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    if missing := study.experiments().keys() - done.keys():
        raise RuntimeError(f"the stock launcher left out {sorted(missing)}")
    startup = statistics.mean(sorted(d["begin"] - clock for d in done.values())[:WORKERS])
    return {"wall": wall, "start-up": startup}, {name: d["accuracies"] for name, d in done.items()}


def run_on_two_nodes(study: Study, folder: Path) -> dict[str, Any]:
    """Run a study on a cluster of two nodes of one CPU each, and count the results of each node."""
    from ray.cluster_utils import Cluster

    start = time.perf_counter()
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
        ready = time.perf_counter() - start
        measured, watch = run_kbit(study, folder, f"ray.address={cluster.address}", find_nodes=True)
    finally:
        cluster.shutdown()
    nodes = [sum(watch.nodes.get(key) == raylet for key in watch.ends) for raylet in raylets]
    if sum(nodes) != len(study.experiments()) or 0 in nodes:
        raise RuntimeError(f"results of each node: {nodes}")
    return {"cluster up": ready, "wall": measured["wall"], "results of each node": nodes}


def call(command: list[str], log: Path, **environment: str) -> None:
    """Run a command with its output in a file.

    Raises:
        RuntimeError: the command fails. The message has the end of the output.
    """
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | environment, cwd=log.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-3000:]}")


def can_run_stock(python: str) -> bool:
    """Return whether the interpreter has the stock launcher."""
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('hydra_plugins.hydra_ray_launcher') is None)"
    return subprocess.run([python, "-c", find], capture_output=True).returncode == 0


def count_items_apart(ours: Accuracies, theirs: Accuracies, limit: int) -> int:
    """Return the number of items by which the accuracy of a task differs at most."""
    return max(round(abs(ours[name][t] - found[t]) * limit) for name, found in theirs.items() for t in NANO_TASKS)


def measure(study: Study, small: Study, python: str, rounds: int) -> dict[str, Any]:
    """Run all parts in turn. Return what they took and found."""
    accuracies: dict[str, list[Accuracies]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sub in ("checkpoints", "tasks", "stock", "nodes", *(f"kbit {n}" for n in range(rounds))):
            (folder / sub).mkdir()
        save_tasks(folder / "tasks")
        save_checkpoints(study, folder / "checkpoints")

        def kbit(n: int) -> dict[str, Any]:
            took, _ = run_kbit(study, folder / f"kbit {n}")
            accuracies.setdefault("kbit", []).append(read_accuracies(study, folder / f"kbit {n}" / "results"))
            return took

        def lm_eval(n: int) -> dict[str, Any]:
            took, found = run_lm_eval(list(study.samples()), study, folder / "checkpoints", folder / "tasks")
            accuracies.setdefault("lm_eval", []).append(found)
            return {"seconds": took, "wall": scale_to_study(study, took)}

        def stock(evaluator: str) -> dict[str, Any]:
            took, found = run_stock(study, evaluator, python, folder / "tasks", folder / "stock")
            accuracies.setdefault(f"stock {evaluator}", []).append(found)
            return took

        in_turn: dict[str, Callable[[int], dict[str, Any]]] = {"kbit": kbit, "lm_eval": lm_eval}
        last = {"two nodes": lambda: run_on_two_nodes(small, folder / "nodes")}
        if can_run_stock(python):
            in_turn["stock hflm"] = lambda n: stock("hflm")
            last["stock"] = lambda: stock("kbit")
        else:
            print(f"the stock launcher is left out: {python} has no hydra-ray-launcher", flush=True)
        measured = [run_steps({way: partial(run, n) for way, run in in_turn.items()}) for n in range(rounds)]
        once = run_steps(last)
    ours = accuracies["kbit"][0]
    apart = {
        way: max(count_items_apart(ours, found, study.limit) for found in each) for way, each in accuracies.items()
    }
    return {"rounds": measured, "once": once, "lowest ratios": find_lowest_ratios(measured, once), "items apart": apart}


def run_steps(steps: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Run each part, and say what it took and how busy the machine was."""
    parts: dict[str, Any] = {}
    for step, run in steps.items():
        with Load() as load:
            parts[step] = run()
        parts[step] |= {"load before": load.before, "largest load": load.largest}
        print(f"{step}: {json.dumps(parts[step])}", flush=True)
    return parts


def scale_to_study(study: Study, seconds: Mapping[str, float]) -> float:
    """Return the wall seconds of the whole study, from those of some of each model's experiments."""
    each = len(study.bits) * len(study.data_types)
    means = [statistics.mean(s for name, s in seconds.items() if name.startswith(f"{m}-")) for m in study.models]
    return each * sum(means) / WORKERS


def find_lowest_ratios(rounds: list[dict[str, Any]], once: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of each way's wall time to kbit's, the lowest of the rounds."""
    ratios = {
        way: min(parts[way]["wall"] / parts["kbit"]["wall"] for parts in rounds) for way in rounds[0] if way != "kbit"
    }
    if "stock" in once:
        ratios["stock"] = once["stock"]["wall"] / statistics.mean(parts["kbit"]["wall"] for parts in rounds)
    return ratios


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["nano-neox-98k", "nano-neox-332k", "nano-opt-98k", "nano-opt-332k"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5, 6, 8])
    parser.add_argument("--data-types", nargs="+", default=["int", "float", "dynamic", "nf"])
    parser.add_argument("--limit", type=int, default=200, help="items of each of the four tasks (default: 200)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock-python", default=sys.executable, help="interpreter that has hydra-ray-launcher")
    options = parser.parse_args()
    study = Study(tuple(options.models), tuple(options.bits), tuple(options.data_types), options.limit)
    small = Study((study.models[0],), study.bits, study.data_types[:2], study.limit)
    os.environ.update(SETTINGS)
    start = time.perf_counter()
    measured = measure(study, small, options.stock_python, options.rounds)
    packages = {name: version(name) for name in ("ray", "hydra-core")}
    record = {
        "machine": {"cpus": os.cpu_count(), "machine": platform.machine()},
        "versions": package_versions() | packages,
        "git_commit": git_commit(),
        "study": asdict(study) | {"experiments": len(study.experiments()), "workers": WORKERS},
        "seconds of the whole benchmark": time.perf_counter() - start,
        **measured,
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"lowest ratios": record["lowest ratios"], "items apart": record["items apart"]}, indent=1))
    return int(max(measured["items apart"].values()) > ITEMS_APART)


if __name__ == "__main__":
    sys.exit(main())
