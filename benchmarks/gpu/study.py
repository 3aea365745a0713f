"""Stage 4: a study through kbit's command line on the card and on the CPU, and the scorer beside lm-eval's own HFLM.

The same experiments run on both devices, each into a store of its own. Accuracies must be equal, and means of nats
within 1e-3. The scorers take turns on a random GPT-NeoX of Pythia-1.4b's shape, with an embedded model's tokenizer and
tasks. HFLM runs as in benchmarks/evaluation.py, and its fastest batch size counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from card import Card, Report
from hydra.core.global_hydra import GlobalHydra
from lm_eval.models.huggingface import HFLM

from kbit import load_model, read_results
from kbit.cli.main import run_command
from kbit.data.tasks import load_tasks
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.zero_shot import PreparedTask, prepare_task
from kbit.silence import silence_libraries

TOLERANCE = (
    1e-3  # of what is no accuracy: nats and the like, and of perplexities, which are their exponentials, a share
)
HFLM_BATCHES = (32, 128)
# hidden size, layers, heads, inner size, vocabulary
NEOX_1_4B = (2048, 24, 16, 8192, 50304)
NEOX_TINY = (32, 1, 2, 64, 2048)
JOIN = ["model", "bits", "data_type", "task", "metric"]


@dataclass(frozen=True)
class Sizes:
    """What runs: the study's arguments, and the shape, dtype, tasks and items of the scorers' model.

    score_tolerance is the share of a log-likelihood by which scorers may differ, which batch in other ways.
    """

    study: tuple[str, ...]
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    tasks: tuple[str, ...]
    items: int
    repeats: int
    score_tolerance: float


FULL = Sizes(
    ("quant.bits=4,16", "quant.data_type=int,nf", "model.name=nano-neox-98k,nano-neox-1m", "eval.limit=100"),
    NEOX_1_4B, torch.bfloat16, ("nano_cloze", "nano_choice", "nano_endings"), 200, 3, 0.02,
)  # fmt: skip
READY = Sizes(
    ("quant.bits=4", "eval.limit=2", "eval.perplexity_windows=1", "eval.tasks=[nano_cloze]"),
    NEOX_TINY, torch.float32, ("nano_cloze",), 3, 1, 1e-4,
)  # fmt: skip


def run(card: Card, report: Report, sizes: Sizes) -> None:
    """Run the study on both devices, then the scorers."""
    silence_libraries()
    for row in compare_devices(card, sizes.study):
        report.add(**row)
    for row in compare_scorers(card, sizes):
        report.add(**row)


def compare_devices(card: Card, study: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield each measurement of the study on the card, on the CPU, and whether they are too far apart."""
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, device in (("cpu", "cpu"), ("card", card.device.type)):
            start, results = time.perf_counter(), str(Path(folder, name))
            run_command(["run", "-m", "hydra/launcher=basic", *study, f"device={device}", f"results={results}"])
            GlobalHydra.instance().clear()  # else the next call is refused
            yield {"name": f"study on {name}", "seconds": time.perf_counter() - start}
            tables[name] = read_results(results, words=True)
    joined = tables["cpu"].merge(tables["card"], on=JOIN, how="outer", suffixes=("_cpu", "_card"))
    for row in joined.to_dict("records"):
        difference = abs(row["value_cpu"] - row["value_card"])
        allowed = 0.0 if row["metric"].startswith("acc") else TOLERANCE * max(1.0, row["value_cpu"])
        label = f"{row['model']} {row['data_type']}{row['bits']} {row['task']} {row['metric']}"
        values = {"cpu": row["value_cpu"], "card": row["value_card"], "difference": difference}
        yield {"name": label, **values, "wrong": [] if difference <= allowed else [f"differs by {difference:.2g}"]}


def compare_scorers(card: Card, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield each scorer's items per second, and the largest difference of their log-likelihoods."""
    tokenizer = load_model("nano-neox-98k").tokenizer
    model = make_neox(sizes.shape, sizes.dtype, card)
    tasks = [prepare_task(task, sizes.items) for task in load_tasks(sizes.tasks)]
    items = sum(len({instance.doc_id for instance in task.instances}) for task in tasks)
    mine: Any = Scorer(model, tokenizer)
    settings: dict[str, Any] = {"softmax_dtype": torch.float32, "logits_cache": False}
    theirs: dict[str, Any] = {
        f"hflm {size}": HFLM(model, tokenizer=tokenizer, batch_size=size, **settings) for size in HFLM_BATCHES
    }
    scorers = {"kbit": mine, **theirs}
    scores = {name: _score(scorer, tasks, card)[0] for name, scorer in scorers.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(sizes.repeats):
        for name, scorer in scorers.items():
            seconds[name].append(_score(scorer, tasks, card)[1])
    taken = {name: statistics.median(found) for name, found in seconds.items()}
    for name in scorers:
        worst = max(abs(a - b) for a, b in zip(scores["kbit"], scores[name], strict=True))
        share = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(scores["kbit"], scores[name], strict=True))
        wrong = [] if share <= sizes.score_tolerance else [f"log-likelihoods differ by {worst:.2g}"]
        row = {"name": name, "items_per_second": items / taken[name], "difference_from_kbit": worst}
        yield row | {"wrong": wrong}
    yield {"name": "kbit / best hflm", "ratio": min(taken[name] for name in theirs) / taken["kbit"], "path": mine.path}


def make_neox(shape: tuple[int, int, int, int, int], dtype: torch.dtype, card: Card) -> Any:
    """Return a random GPT-NeoX, made on the card."""
    hidden, layers, heads, inner, vocabulary = shape
    config = transformers.GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    return card.make_model(config, dtype)


def _score(lm: Any, tasks: list[PreparedTask], card: Card) -> tuple[list[float], float]:
    """Return the log-likelihoods of all requests, and the seconds."""
    card.wait()
    start = time.perf_counter()
    score: Callable[..., list[tuple[float, bool]]] = lm.loglikelihood
    found = [value for task in tasks for value, _ in score(task.instances, disable_tqdm=True)]
    card.wait()
    return found, time.perf_counter() - start


def summarize(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield how far the devices are apart, and the scorers' ratio."""
    compared = [row for row in rows if "difference" in row]
    wrong = [row["name"] for row in rows if row.get("wrong")]
    if compared:
        largest = max(row["difference"] for row in compared)
        yield f"{len(compared)} measurements on card and CPU: largest difference {largest:.2g}" + (
            f"; wrong: {', '.join(wrong)}" if wrong else ""
        )
    for row in rows:
        if "items_per_second" in row:
            yield f"{row['name']}: {row['items_per_second']:.1f} items/s"
        if "ratio" in row:
            yield f"{row['name']}: {row['ratio']:.2f} ({row['path']})"
