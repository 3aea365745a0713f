"""This checkout beside another one of kbit, such as an older commit: kernels, methods, scorer, sweep and start-up.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before [--rounds 5] [--parts kernels methods scorer sweep start]

Both checkouts run the same code, which uses nothing but kbit's public names and commands, in processes of their own and
in turn, so that a busy machine slows both. Each number is the least of all rounds. A ratio above 1 says that this
checkout is faster. What is computed must be equal in both checkouts, or the exit code is 1. Writes
benchmarks/results/checkouts.json after each part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RECORD: Final = Path(__file__).parent / "results" / "checkouts.json"
SIZE: Final = 4096  # rows and columns of the matrix that the kernels quantize
REPEATS: Final = 5  # of a measured call within a process, after one that compiles and warms up
STUDY: Final = (
    "-m",
    "quant.bits=3,4",
    "quant.data_type=int,nf",
    "model.name=nano-neox-98k,nano-neox-332k",
    "eval.limit=100",
)

Measured = dict[str, Any]  # seconds by name, and "digest": a hash of what was computed


def time_calls(calls: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Return the least wall time of each call, in seconds."""
    seconds = {}
    for name, call in calls.items():
        call()
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        seconds[name] = min(taken)
    return seconds


def measure_kernels() -> Measured:
    """Quantize, dequantize and fake-quantize one matrix in two dtypes."""
    import torch

    import kbit

    calls: dict[str, Callable[[], Any]] = {}
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for spec in (
            kbit.QuantSpec(bits=4, data_type="nf"),
            kbit.QuantSpec(bits=3, data_type="int", normalization="minmax"),
        ):
            name = f"{spec.label()} {spec.normalization} {str(dtype).removeprefix('torch.')}"
            quantized = kbit.quantize(x, spec)
            calls[f"quantize {name}"] = lambda x=x, spec=spec: kbit.quantize(x, spec)
            calls[f"dequantize {name}"] = lambda q=quantized: kbit.dequantize(q)
            calls[f"fake_quantize {name}"] = lambda x=x, spec=spec: kbit.fake_quantize(x, spec)
            digest.update(kbit.fake_quantize(x, spec).float().numpy().tobytes())
    return {**time_calls(calls), "digest": digest.hexdigest()}


def measure_methods() -> Measured:
    """Quantize nano-neox-7m by each method that needs no text, and nano-neox-98k by the others."""
    import kbit

    digest = hashlib.sha256()
    seconds: dict[str, float] = {}
    for method in ("rtn", "mse", "hqq", "awq", "gptq", "llm_int8"):
        name = "nano-neox-98k" if method in ("awq", "gptq") else "nano-neox-7m"
        config = kbit.QuantConfig(bits=8 if method == "llm_int8" else 4, data_type="nf", method=method)
        taken = []
        for _ in range(3):
            loaded = kbit.load_model(name)
            start = time.perf_counter()
            kbit.quantize_model(loaded.model, config, loaded.tokenizer)
            taken.append(time.perf_counter() - start)
        for parameter in loaded.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        seconds[f"{method} on {name}"] = min(taken)
    return {**seconds, "digest": digest.hexdigest()}


def measure_scorer() -> Measured:
    """Score nano-neox-1m on the four nano tasks."""
    import torch

    import kbit

    torch.set_num_threads(1)
    loaded = kbit.load_model("nano-neox-1m")
    tasks = ["nano_cloze", "nano_choice", "nano_swap", "nano_endings"]
    measured = kbit.evaluate(loaded.model, loaded.tokenizer, tasks, limit=100)
    call = {"four tasks, 100 items each": lambda: kbit.evaluate(loaded.model, loaded.tokenizer, tasks, limit=100)}
    return {**time_calls(call, repeats=3), "digest": str([(m.task, m.metric, m.value) for m in measured])}


def measure_sweep() -> Measured:
    """Run a study of eight experiments in one process, and on two Ray workers."""
    import kbit

    seconds, digests = {}, []
    for name, arguments in {
        "one process": ("hydra/launcher=basic",),
        "two Ray workers": ("ray.num_workers=2",),
    }.items():
        start = time.perf_counter()
        run_command("run", *STUDY, *arguments, f"results={name.split()[0]}")
        seconds[name] = time.perf_counter() - start
        table = kbit.read_results(name.split()[0])
        digests.append(str(table[["key", "task", "metric", "value"]].values.tolist()))
    return {**seconds, "digest": hashlib.sha256("".join(digests).encode()).hexdigest()}


def measure_start() -> Measured:
    """Start commands that run no experiment."""
    calls = {"import kbit": lambda: subprocess.run([sys.executable, "-c", "import kbit"], check=True)}
    calls |= {
        "kbit --help": lambda: run_command("--help"),
        "kbit plan of 8": lambda: run_command("plan", *STUDY),
        "kbit run --help": lambda: run_command("run", "--help"),
    }  # fmt: skip
    return {**time_calls(calls, repeats=2), "digest": ""}


PARTS: Final[dict[str, Callable[[], Measured]]] = {
    "kernels": measure_kernels,
    "methods": measure_methods,
    "scorer": measure_scorer,
    "sweep": measure_sweep,
    "start": measure_start,
}


def run_command(*arguments: str) -> None:
    """Run kbit's command line of the checkout that this process measures."""
    subprocess.run([sys.executable, "-m", "kbit", *arguments], check=True, capture_output=True)


def run_part(checkout: Path, part: str) -> Measured:
    """Measure one part of one checkout in a process of its own, in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", part]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    if Path(measured.pop("from")).resolve().parents[1] != checkout.resolve():
        raise RuntimeError(f"the process did not import kbit from {checkout}")
    return measured


def compare(other: Path, parts: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield after each part the least seconds of both checkouts and their ratios, other / this, of all parts so far."""
    found: dict[str, Any] = {}
    for part in parts:
        runs: list[list[Measured]] = [[], []]
        for _ in range(rounds):
            for own, checkout in zip(runs, (other, ROOT), strict=True):
                own.append(run_part(checkout, part))
        before, after = ({n: min(run[n] for run in own) for n in own[0] if n != "digest"} for own in runs)
        found[part] = {
            "equal": len({run["digest"] for own in runs for run in own}) == 1,
            "other": before, "this": after,
            "ratio": {name: before[name] / after[name] for name in after},
        }  # fmt: skip
        for name, ratio in found[part]["ratio"].items():
            print(f"{part:8} {name:40} {before[name]:8.3f} s {after[name]:8.3f} s {ratio:6.2f}", flush=True)
        yield found


def main() -> None:
    """Compare two checkouts, or (--child) measure one part of the one on PYTHONPATH."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", nargs="?", type=Path, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="how often each checkout is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import kbit

        print(json.dumps(PARTS[options.child]() | {"from": kbit.__file__}))
        return
    commits = [
        subprocess.run(
            ["git", "-C", path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for path in (options.other, ROOT)
    ]
    load = os.getloadavg()[0]
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load before": load}
    for found in compare(options.other.resolve(), options.parts, options.rounds):
        record = {"machine": machine, "rounds": options.rounds, "other": commits[0], "this": commits[1], "parts": found}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(not all(part["equal"] for part in found.values()))


if __name__ == "__main__":
    main()
