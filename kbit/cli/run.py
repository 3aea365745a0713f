"""`kbit run`, `kbit plan` and `kbit outliers`: the way from configurations to a finished sweep and its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Final

from kbit.checks import KbitError

if TYPE_CHECKING:
    import pandas as pd

    from kbit.cli.hydra.compose import Request
    from kbit.engine.estimate import Estimator
    from kbit.engine.outcome import Outcome
    from kbit.engine.plan import Plan
    from kbit.engine.progress import Progress
    from kbit.engine.rounds import Rounds
    from kbit.experiments.config import Experiment, RunConfig
    from kbit.store.store import Store

_OUTLIERS: Final = """\
Find the emergent outlier features of a model (LLM.int8(), section 4): hidden dimensions with large values in many
layers and at many positions of a text; what zeroing them does, beside as many random dimensions; and how well the
weights tell which units have large values (the k-bit paper, table 2). The same as
`kbit run quant.bits=16 eval.tasks=[] eval.features.measure=true`: every argument of `kbit run --help` can be given.

  eval.features.magnitude=6.0     from which on a value is large
  eval.features.layers=0.25       least share of layers in which a feature is large
  eval.features.positions=0.06    least share of positions at which it is
  eval.perplexity=nano_held_out   the text: a name or a file
  eval.perplexity_windows=256     at most so many windows of it
"""

_OUTLIERS_EXAMPLES: Final = """\
examples:
  kbit outliers model.name=nano-neox-7m
  kbit outliers -m model.name=nano-neox-1m,nano-neox-3m
  kbit outliers quant.bits=8 quant.method=llm_int8     the same of a quantized model
"""


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit run`, whose arguments and help are Hydra's."""
    text = "quantize and evaluate one model, or with -m / +sweeps=... a grid"
    parser = commands.add_parser("run", help=text, add_help=False, allow_abbrev=False)
    parser.set_defaults(takes_keys=True)


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit plan`."""
    text = "say what the same arguments would run, and run nothing"
    parser = commands.add_parser("plan", help=text, add_help=False, allow_abbrev=False)
    parser.set_defaults(takes_keys=True, multirun=True, last=["hydra.launcher.plan_only=true"])


def add_outliers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit outliers`."""
    parser = commands.add_parser(
        "outliers",
        usage="kbit outliers [arguments of run]",
        help="find a model's emergent outlier features; arguments as of run",
        description=_OUTLIERS,
        epilog=_OUTLIERS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(takes_keys=True, first=["quant.bits=16", "eval.tasks=[]", "eval.features.measure=true"])


def run_request(request: Request) -> None:
    """Plan and run the experiments of a request, and print the plan and what came of it.

    Raises:
        KbitError: an asked result does not exist in the end.
        ValueError, OSError: a name, a setting or the store is wrong, or the work cannot go on.
    """
    from kbit.engine.estimate import Estimator
    from kbit.engine.plan import plan_sweep
    from kbit.engine.progress import Progress
    from kbit.store.filesystem import check_space, check_writable

    settings = request.configs[0]
    for note in _list_notes(request):
        print(f"kbit: note: {note}", file=sys.stderr)
    plan = plan_sweep(request.configs, request.engine, plan_only=request.plan_only)
    check_writable(settings.results)
    if request.plan_only:
        store = None
    else:
        check_space(settings.results, len(plan.to_run))
        store = _open_store(settings.results, request.engine)
    print(plan.describe())
    estimator, expected = Estimator(settings.device), ""
    if plan.to_run and (request.plan_only or len(request.configs) > 1):
        expected = _estimate(plan, settings, request.engine, estimator)
    if store is None:
        return
    until_decided, still_open = settings.study.until.decided, set[str]()
    if plan.to_run:
        shown = [] if until_decided else plan.to_run  # rounds say themselves what is in them
        progress = Progress(shown, estimator, store, expected)
        still_open = _carry_out(plan, progress, settings, request.engine, store)
    stopped = set(store.list_rounds(plan.keys.values())) if until_decided else set[str]()
    missing = _report_results(plan, settings, store, stopped, still_open)
    if until_decided:
        from kbit.cli.study.decided import describe_study

        print("\n".join(describe_study(plan, settings, store, estimator)))
    if missing:
        raise KbitError(missing)


def _estimate(plan: Plan, settings: RunConfig, engine: str, estimator: Estimator) -> str:
    """Print what a plan will take, and return how long."""
    workers, start = _predict_workers(plan, settings, engine, estimator.predict_memory(plan.to_run))
    estimator.learn_stored(settings.results, plan.to_run, _count_threads(settings, engine))
    print(estimator.describe(plan.to_run, workers, start))
    if settings.study.until.decided:
        from kbit.cli.study.decided import describe_bounds

        print(describe_bounds(plan, estimator, settings.results))
    return estimator.predict_time(Counter(map(estimator.classify, plan.to_run)), workers or 1, start=start)


def _list_notes(request: Request) -> Iterator[str]:
    """Yield what a user should know of a request before it runs."""
    from kbit.checks import non_defaults
    from kbit.engine.plan import list_own_code
    from kbit.experiments.config import RayConfig
    from kbit.methods.config import find_idle_fields
    from kbit.training.config import find_idle_keys

    for path in list_own_code(request.configs):
        yield f"{path} runs Python code of its own (!function)"
    if request.engine == "process":
        for name, value in non_defaults(request.configs[0].ray, RayConfig()).items():
            yield f"ray.{name}={value} has no effect: a single run, and hydra/launcher=basic, go without Ray"
    for name, quant in find_idle_fields([config.quant for config in request.configs]).items():
        beside = f"quant.data_type={quant.data_type} and quant.method={quant.method}"
        yield f"quant.{name} was set and changes nothing beside {beside}"
    trainings = [config.train for config in request.configs]
    is_trained = any(train.steps for train in trainings)
    why = "beside the other keys of train" if is_trained else "at train.steps=0, which is no training"
    for name in find_idle_keys(trainings):
        yield f"train.{name} was set and changes nothing {why}"


def _open_store(path: str, engine: str) -> Store:
    from kbit.store.store import Store

    store = Store(path)
    if engine == "ray" and store.root.startswith("memory://"):
        raise ValueError(f"results={store.root}: no other process sees it; use hydra/launcher=basic")
    return store


def _carry_out(plan: Plan, progress: Progress, settings: RunConfig, engine: str, store: Store) -> set[str]:
    """Run a plan, show its progress, and return the keys of which more would have to be measured (Rounds.list_open).

    The generator is closed at the end, so that Ray ends at once.
    """
    from kbit.cli.study.decided import make_rounds
    from kbit.engine.progress import compact_quietly

    rounds = make_rounds(plan, settings, store, progress)
    try:
        with closing(progress), closing(_start(plan, progress, settings, engine, store, rounds)) as outcomes:
            for outcome in outcomes:
                progress.take(outcome)
                if outcome.error and settings.fail_fast:
                    break
    except KeyboardInterrupt:
        print(f"\nstopped; finished results are kept in {store.root}: the same command goes on", file=sys.stderr)
        raise
    compact_quietly(store)
    return rounds.list_open()


def _start(
    plan: Plan, progress: Progress, settings: RunConfig, engine: str, store: Store, rounds: Rounds
) -> Generator[Outcome]:
    """Return a generator of a plan's outcomes. The work begins when the first one is asked for."""
    from kbit.engine.ray_cluster import run_on_ray
    from kbit.engine.worker import RayWorker, run_in_process

    if engine == "process":
        return run_in_process(plan, store.root, settings.device, rounds)
    return run_on_ray(
        plan,
        RayWorker,
        store.root,
        settings.device,
        settings.ray,
        cost=progress.estimator.cost_of,
        worker_bytes=progress.estimator.predict_memory(plan.to_run),
        announce=progress.say,
        notify=progress.show,
        rounds=rounds,
    )


def _count_threads(settings: RunConfig, engine: str) -> int:
    """Return the number of threads of each worker."""
    if engine != "process":
        return settings.ray.cpus_per_worker
    import torch  # takes a second, and a run needs it anyway

    return torch.get_num_threads()


def _predict_workers(
    plan: Plan, settings: RunConfig, engine: str, worker_bytes: int | None
) -> tuple[int | None, float]:
    """Return how many workers a plan will have, and the seconds until they begin. None: only the cluster tells."""
    from kbit.engine.machine import count_cpus, find_free_memory, limit_by_memory, predict_start

    workers: int | None = 1
    local = settings.ray.address == "local"
    if engine != "process":
        fitting = max(1, count_cpus() // settings.ray.cpus_per_worker) if settings.device == "cpu" and local else None
        free = fitting and limit_by_memory(fitting, worker_bytes, find_free_memory())
        workers = settings.ray.num_workers or free
    workers = None if workers is None else min(workers, len(plan.to_run))
    return workers, predict_start(engine, workers or 1, local=local)


def _report_results(plan: Plan, settings: RunConfig, store: Store, stopped: set[str], still_open: set[str]) -> str:
    """Print how many of the asked results the store has now, and the numbers if one was asked.

    An experiment stopped early if no verdict needs more of it. One that failed in a later round is missing.

    Args:
        plan: the plan.
        settings: how it was run.
        store: the store.
        stopped: the keys of experiments that have measured a part of their items in rounds.
        still_open: the keys of experiments that are to be measured further than they were.

    Returns:
        How many asked results are missing, or "" if there are all.
    """
    from kbit.store.readers import list_readable, read_failures

    distinct = {key: experiment for experiment, key in plan.keys.items()}
    failures = read_failures(store.root).set_index("key")
    early = (distinct.keys() & stopped) - still_open - set(failures.index)
    missing = distinct.keys() - list_readable(store.root) - early
    if not missing:
        if len(distinct) == 1:
            print(_describe_results(store.root, next(iter(distinct))))
        how = f", {len(early)} of them stopped early" if early else ""
        print(f"{len(distinct)} of {len(distinct)} asked results are in {store.root}{how}")
        if len(distinct) > 1:
            place = shlex.quote(settings.results)
            print(f"see them: kbit figures --results {place}, kbit results --results {place}")
        return ""
    reasons = {str(key): (str(row["state"]), str(row["reason"])) for key, row in failures.iterrows()}
    why = "its record cannot be read: once it is removed, the same command runs it"
    reasons |= dict.fromkeys(missing & store.finished_keys(), ("damaged", why))
    why = "a part of its items is measured, and its verdict is open: the same command goes on"
    reasons = dict.fromkeys(missing & stopped, ("in part", why)) | reasons
    print(_tabulate_missing({key: distinct[key] for key in missing}, reasons, store), file=sys.stderr)
    return f"{len(missing)} of {len(distinct)} asked results are missing; tracebacks are in {store.root}/failures"


def _tabulate_missing(missing: Mapping[str, Experiment], reasons: Mapping[str, tuple[str, str]], store: Store) -> str:
    """Return a line for each experiment without a result, those of one reason together, and below them the reason."""
    from kbit.experiments.names import find_varied, name_experiment

    varied = find_varied(missing.values())
    groups: dict[tuple[str, str], list[str]] = {}
    for key in missing:
        groups.setdefault(reasons.get(key, ("not run", "")), []).append(key)
    lines = []
    for (state, reason), keys in sorted(groups.items()):
        lines += sorted(f"{state:<8} {name_experiment(missing[key], varied)}  ({key})" for key in keys)
        logs = [log for key in keys if (log := store.log_path(key)) is not None and log.exists()]
        where = f"; its log: {logs[0]}" if len(logs) == 1 else f"; logs are in {logs[0].parent}" if logs else ""
        lines += [f"         {reason}{where}"] if reason else []
    return "\n".join(lines)


def _describe_results(store_path: str, key: str) -> str:
    """Return the measurements of one experiment as a table."""
    from kbit.store.readers import read_results

    rows = read_results(store_path).query("key == @key")
    first = rows.iloc[0]
    head = f"{first['model']}: {first['total_bits'] / 1e6:.2f} Mbit in all, {first['bits_per_param']:.2f} bits/param"
    table = rows[["task", "metric", "value", "low", "high", "n"]].to_string(index=False)
    others = (*_describe_budget(store_path, key), *_explain_control(rows), *_describe_features(store_path, key))
    return "\n".join([head, table, *others])


def _describe_budget(store_path: str, key: str) -> list[str]:
    """Return what is left of a budget of bits, and where its map is, or nothing without a budget."""
    from kbit.experiments.result import Result
    from kbit.store.records import read_as

    notes = [result.method_notes.get("allocation") for result in read_as(Result, store_path, keys=[key])]
    return [
        f"of a budget of {note['budget_bits']:,} bits, {note['left_bits']:,} are left; the map of its "
        f"{len(note['rules'])} rules is in the record (method_notes.allocation.rules)"
        for note in notes
        if note is not None
    ]


def _explain_control(rows: pd.DataFrame) -> list[str]:
    """Return why features were found and zeroed without a control of random dimensions (see measure_ablation)."""
    return [
        f"no random control: {count:.0f} of {width} dimensions are features, so that there are not as many others"
        for count, width in rows.loc[rows["metric"] == "features", ["value", "n"]].itertuples(index=False)
        if count > width / 2
    ]


def _describe_features(store_path: str, key: str) -> list[str]:
    """Return a line for each hidden dimension that is large most often, or none if they were not looked for."""
    from kbit.store.readers import read_features

    rows = read_features(store_path, [key])
    lines = []
    for (dimension, is_feature), places in rows.groupby(["dimension", "is_feature"], sort=False):
        first, top = places.iloc[0], places.sort_values("largest", key=abs).iloc[-1]
        lines.append(
            f"dimension {dimension}{' (feature)' if is_feature else ''}: large in {first['layers']:.0%} of layers, at "
            f"{first['positions']:.2%} of positions; up to {top['largest']:.1f}, layer {top['layer']} {top['input']}"
        )
    return lines
