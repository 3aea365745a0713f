"""A study that stops when it knows: how much it measures, and how often it is wrong.

    python benchmarks/decided.py simulate [--studies 1000]
    python benchmarks/decided.py replay RESULTS [RESULTS ...]

simulate makes studies whose truth is known, of windows (heavy tails) and of tasks (right or wrong), and stops each as
study.until.decided=true would. replay takes whole studies that a store holds with their items, and stops each in the
same way, so that nothing needs to be run again. Both add to benchmarks/results/decided.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from kbit.analysis.curves.curves import Floats
from kbit.analysis.statistics.stopping.contests import Question
from kbit.analysis.statistics.stopping.looks import Scores, decide, find_goals, list_asked, take_scores
from kbit.analysis.statistics.stopping.sequential import UNDECIDED, Contest, Standing, judge_whole, look, name_best
from kbit.analysis.statistics.verdicts import tabulate_verdicts
from kbit.evaluation.measurement import ItemValues, decode_items, encode_items, mean_accuracy, measure_mean
from kbit.evaluation.rounds.order import LAST, SHARES, TASKS, TEXT, list_places
from kbit.evaluation.rounds.sample import SampledPart
from kbit.experiments.config import UntilConfig
from kbit.experiments.result import Result
from kbit.experiments.rounds import list_parts
from kbit.store.readers import read_results
from kbit.store.results import load_results
from kbit.store.stopped.complete import read_measured
from kbit.store.store import Store

RESULTS: Final = Path(__file__).parent / "results" / "decided.json"
CONTESTS: Final = 8  # of a simulated study, as many as nano/bit_level has
OPTIONS: Final = 5


@dataclass(frozen=True)
class Truth:
    """A contest whose best option is known.

    Attributes:
        contest: the contest, in which each option is a point.
        scores: the scores of all items of each task, [options, items].
        best: the best option, or UNDECIDED if several are.
    """

    contest: Contest
    scores: list[Floats]
    best: str


def make_contest(options: int) -> Contest:
    """Return a contest in which each option is one point."""
    unit = np.eye(options)
    names = tuple(f"option {number}" for number in range(options))
    return Contest("simulated", names, unit[:, None] - unit[None], tuple((number,) for number in range(options)))


def draw_truth(rng: np.random.Generator, kind: str) -> Truth:
    """Return a contest with known truth.

    Options differ by nothing (a quarter of all contests), or by normal effects of a size between invisible and plain.
    Windows: what a window costs all options has a normal distribution, and what it costs one of them Student's t with
    3 degrees of freedom. Tasks: an item is right if ability, difficulty and luck add up to more than 0.
    """
    null = rng.random() < 0.25
    size = 10 ** rng.uniform(-1.5, 1)
    effects = np.zeros(OPTIONS) if null else rng.normal(0, size, OPTIONS)
    if not null and rng.random() < 0.25:
        effects[np.argsort(effects)[-2]] = effects.max()  # two share the first place
    if kind == "windows":
        scores = [effects[:, None] + rng.normal(0, 3, 256) + rng.standard_t(3, (OPTIONS, 256))]
    else:
        scores = [
            (effects[:, None] + rng.normal(0, 3, 500) + rng.normal(0, 1, (OPTIONS, 500)) > 0).astype(np.float64)
            for _ in range(4)
        ]
    first = np.flatnonzero(effects == effects.max())
    contest = make_contest(OPTIONS)
    return Truth(contest, scores, contest.options[int(first[0])] if len(first) == 1 else UNDECIDED)


def stop(truth: Truth, pairs: int) -> tuple[str, float]:
    """Return the verdict of a contest that stops when it is known, and the share of the items that it takes."""
    standing, spent = Standing(tuple(range(OPTIONS))), 0.0
    totals = [task.shape[1] for task in truth.scores]
    for rounds in range(1, LAST + 1):
        share = SHARES[rounds - 1] - (SHARES[rounds - 2] if rounds > 1 else 0)
        spent += share * len(standing.left) / OPTIONS
        if rounds == LAST:
            break
        sample = [task[:, list_places(task.shape[1], rounds)] for task in truth.scores]
        standing = look(truth.contest, standing, sample, totals, pairs)
        if standing.is_known:
            return name_best(truth.contest, standing), spent
    left = list(standing.left)
    rest = make_contest(len(left))
    found = judge_whole(rest, [task[left] for task in truth.scores])
    return found if found == UNDECIDED else truth.contest.options[left[rest.options.index(found)]], spent


def simulate(studies: int, kind: str, seed: int = 0) -> dict[str, Any]:
    """Return how often simulated studies are wrong, whole and stopped, and the share of the items that they take."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    spent = 0.0
    for _ in range(studies):
        truths = [draw_truth(rng, kind) for _ in range(CONTESTS)]
        pairs = sum(truth.contest.pairs for truth in truths)
        is_different = False
        for truth in truths:
            whole, (early, items) = judge_whole(truth.contest, truth.scores), stop(truth, pairs)
            spent += items
            counts["wrong"] += early not in (truth.best, UNDECIDED)
            counts["wrong in full"] += whole not in (truth.best, UNDECIDED)
            counts["best named"] += early != UNDECIDED
            counts["best named in full"] += whole != UNDECIDED
            counts["not the full verdict"] += early != whole
            counts["another option than the full verdict"] += UNDECIDED not in (early, whole) and early != whole
            is_different |= early != whole
        counts["studies with another verdict than in full"] += is_different
    verdicts = studies * CONTESTS
    shares = {name: count / (studies if name.startswith("studies") else verdicts) for name, count in counts.items()}
    return {"kind": kind, "studies": studies, "verdicts": verdicts, "share of the items": spent / verdicts, **shares}


def replay(path: str, until: UntilConfig) -> dict[str, Any]:
    """Return what a whole study of a store would have measured until decided, and which verdicts would be others.

    The rounds are those of kbit.engine.rounds. What they would have left in the store is written to a store of its own,
    of which `kbit figures verdicts` is made, too.
    """
    results = {result.key: result for result in load_results(path)}
    assert not any(result.sampled for result in results.values()), "a study in full is needed"
    done = {key: dict.fromkeys(list_parts(result.experiment), 1) for key, result in results.items()}
    questions = list_asked(read_results(path), until)
    scores = read_measured(path, results.keys())
    by_round = []
    for rounds in range(1, LAST):
        decisions = decide(questions, scores, rounds)
        by_round.append(sum(decision.standing.is_known for decision in decisions))
        for key, goals in find_goals(decisions, rounds).items():
            done[key] |= goals
    decisions = decide(questions, scores, LAST)
    whole = {id(q): judge_whole(q.contest, take_all(q, scores)) for q in questions}
    early = {id(d.question): name_best(d.question.contest, d.standing) for d in decisions if d.standing.is_known}
    wrong = [d.describe() for d in decisions if d.standing.is_known and early[id(d.question)] != whole[id(d.question)]]
    spent = sum(count_tokens(results[key], rounds) for key, rounds in done.items())
    total = sum(result.tokens for result in results.values())
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for key, rounds in done.items():
            store.write(cut_result(results[key], rounds))
        verdicts = compare_tables(read_results(path), read_results(folder, stopped=True))
    return {
        "claims": list(until.claims), "metrics": list(until.metrics), "experiments": len(results),
        "experiments that stopped early": sum(min(rounds.values()) < LAST for rounds in done.values()),
        "verdicts": len(questions), "known or given up after each round": by_round,
        "given up": sum(d.standing.given_up for d in decisions),
        "other than in full": len(wrong), "which": wrong,
        "tokens": spent, "tokens in full": total, "share of the tokens": spent / total,
        "table of verdicts": verdicts,
    }  # fmt: skip


def take_all(question: Question, scores: Mapping[str, Scores]) -> list[Floats]:
    """Return the scores of all items of a contest's tasks."""
    everything = Standing(tuple(range(len(question.contest.options))))
    return take_scores(question, scores[question.measure.metric], everything, LAST)[0]


def count_tokens(result: Result, rounds: dict[str, int]) -> float:
    """Return the tokens that an experiment takes in these rounds: each part's in proportion to its items."""
    text = 0 if result.text is None else result.text.windows * result.text.window_length
    parts = {TEXT: text, TASKS: result.tokens - text}
    return sum(parts[part] * SHARES[number - 1] for part, number in rounds.items())


def cut_result(result: Result, rounds: dict[str, int]) -> Result:
    """Return what these rounds of an experiment would have left of a result in full."""
    if min(rounds.values()) == LAST:
        return result
    texts = {result.text.name} if result.text is not None else set()
    items: list[ItemValues] = []
    counts: dict[tuple[str, str], tuple[str, int, Floats]] = {}
    for own in result.items:
        part = TEXT if own.task in texts else TASKS
        values = decode_items(own)[list_places(own.n, rounds[part])]
        items.append(encode_items(own.task, own.metric, values.tolist(), exactly=True))
        counts[own.task, own.metric] = (part, own.n, values)
    totals: dict[str, dict[str, int]] = {part: {} for part in rounds}
    for (task, _), (part, total, _) in counts.items():
        totals[part][task] = total
    measured = [measure_mean(task, metric, values.tolist()) for (task, metric), (_, _, values) in counts.items()]
    accuracies = [m for m in measured if m.metric == "acc"]
    measured += [mean_accuracy(accuracies)] if len(accuracies) > 1 else []
    sampled = tuple(SampledPart(part, number, totals[part]) for part, number in rounds.items())
    return dataclasses.replace(result, items=tuple(items), measurements=tuple(measured), sampled=sampled)


def compare_tables(full: pd.DataFrame, early: pd.DataFrame) -> dict[str, Any]:
    """Return how many rows of the table of verdicts are the same, and the others."""
    about = ["family", "data_type", "block_size", "measure"]
    tables = [tabulate_verdicts(results).set_index(about)[["bits", "grade"]].astype(str) for results in (full, early)]
    joined = tables[0].join(tables[1], rsuffix="_early", how="outer").fillna("missing")
    same = (joined["bits"] == joined["bits_early"]) & (joined["grade"] == joined["grade_early"])
    others = [
        f"{', '.join(map(str, name))}: {row.bits}-bit {row.grade}, early {row.bits_early}-bit {row.grade_early}"
        for name, row in zip(joined.index[~same], joined[~same].itertuples(), strict=True)
    ]
    same_grade = joined["grade"] == joined["grade_early"]
    return {"rows": len(joined), "same": int(same.sum()), "same grade": int(same_grade.sum()), "others": others}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("simulate").add_argument("--studies", type=int, default=1000)
    commands.add_parser("replay").add_argument("stores", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        found: dict[str, Any] = {kind: simulate(arguments.studies, kind) for kind in ("windows", "tasks")}
    else:
        ways = [UntilConfig(metrics=metrics) for metrics in ((), ("cross_entropy",))]
        ways.append(UntilConfig(claims=("frontier",), metrics=("cross_entropy",)))
        found = {Path(store).name: [replay(store, until) for until in ways] for store in arguments.stores}
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(record | {arguments.command: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
