"""The sweep engine: what it plans, and that one failure costs one experiment."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.engine.estimate import Estimator, format_seconds
from kbit.engine.outcome import Outcome
from kbit.engine.plan import Plan, make_plan
from kbit.engine.progress import Progress
from kbit.engine.worker import Worker, run_in_process
from kbit.engine.worker_log import log_output
from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.names import show_value
from kbit.experiments.result import CRASHED
from kbit.methods.config import QuantConfig
from kbit.models.catalog import EMBEDDED
from kbit.models.config import ModelConfig
from kbit.store.damage import DamagedRecordWarning
from kbit.store.filesystem import LocalFiles
from kbit.store.readers import list_keys, read_failures, read_results
from kbit.store.store import Store

SMALL = EvalConfig(tasks=(), perplexity_windows=4)
MODEL = "nano-neox-98k"


def make_experiment(bits: int, model: str = MODEL, data_type: str = "int") -> Experiment:
    """A perplexity of four windows: tenths of a second."""
    return Experiment(ModelConfig(model), QuantConfig(bits=bits, data_type=data_type), SMALL)


def touch(store: Path, kind: str, experiment: Experiment) -> None:
    """Let the store have a file for an experiment; a plan looks at names only."""
    (store / kind).mkdir(parents=True, exist_ok=True)
    (store / kind / f"{find_key(experiment)}.json").touch()


def run(experiments: Sequence[Experiment], store: Path) -> tuple[Plan, list[Outcome]]:
    """Plan and run in this process, as the command line does. Return the plan and the failures."""
    plan = make_plan(experiments, store)
    return plan, follow(run_in_process(plan, str(store), "cpu"), plan)


def follow(outcomes: Iterable[Outcome], plan: Plan, store: Store | None = None) -> list[Outcome]:
    """Show the outcomes and return the failures."""
    failures = []
    with closing(Progress(plan.to_run, Estimator(), store)) as progress:
        for outcome in outcomes:
            progress.take(outcome)
            failures += [outcome] if outcome.error else []
    return failures


def copy_model(folder: Path) -> Path:
    """A copy of the smallest embedded model, to be damaged."""
    return Path(shutil.copytree(EMBEDDED / MODEL, folder / "model"))


@pytest.fixture
def nan_model(tmp_path: Path) -> Path:
    """A model with three NaN in one weight."""
    folder = copy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.attention.dense.weight"
    weights[name].view(-1)[:3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def truncated_model(tmp_path: Path) -> Path:
    """A model whose weight file was cut in half, as by a full disk."""
    folder = copy_model(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def test_plan_counts_asked_and_distinct(tmp_path: Path) -> None:
    experiments = [make_experiment(bits) for bits in (4, 4, 5, 4)]
    plan = make_plan(experiments, tmp_path / "none")
    assert (plan.asked, len(plan.keys), plan.done, plan.failed, len(plan.to_run)) == (4, 2, 0, 0, 2)
    assert not (tmp_path / "none").exists()


def test_plan_drops_what_is_done_and_what_failed(tmp_path: Path) -> None:
    done, failed, fresh = (make_experiment(bits) for bits in (3, 4, 5))
    touch(tmp_path, "experiments", done)
    Store(tmp_path).write_failure(find_key(failed), failed, "no", "")
    plan = make_plan([done, failed, fresh], tmp_path)
    assert (plan.done, plan.failed, plan.crashed, plan.to_run) == (1, 1, 0, (fresh,))
    assert plan.describe() == (
        "3 asked, 3 distinct, 1 done, 1 failed before (retry_failed=true runs them again), 1 to run"
    )


def test_plan_tries_failed_ones_again_if_asked(tmp_path: Path) -> None:
    failed = make_experiment(4)
    Store(tmp_path).write_failure(find_key(failed), failed, "no", "")
    plan = make_plan([failed], tmp_path, retry_failed=True)
    assert (plan.failed, plan.to_run) == (0, (failed,))
    assert plan.describe() == "1 asked, 1 distinct, 0 done, 1 to run"


def test_plan_tries_what_crashed_again_and_not_what_failed(tmp_path: Path) -> None:
    crashed, failed, old = (make_experiment(bits) for bits in (3, 4, 5))
    store = Store(tmp_path)
    store.write_failure(find_key(crashed), crashed, "the worker died 2 times", "", CRASHED)
    store.write_failure(find_key(failed), failed, "ValueError: no", "")
    store.write_failure(find_key(old), old, "no", "")
    path = tmp_path / "failures" / f"{find_key(old)}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "state"}))
    plan = make_plan([crashed, failed, old], tmp_path)
    assert (plan.failed, plan.crashed, plan.to_run) == (2, 1, (crashed,))
    assert plan.describe().endswith(
        ", 0 done, 2 failed before (retry_failed=true runs them again), 1 to run (1 crashed before)"
    )
    assert read_failures(tmp_path).set_index("bits")["state"].to_dict() == {3: "crashed", 4: "failed", 5: "failed"}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (MemoryError("not even one sequence fits into memory"), "crashed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "crashed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "crashed"),
        (RuntimeError("shapes do not fit"), "failed"),
        (OSError("no such model"), "failed"),
    ],
)
def test_lack_of_memory_is_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    monkeypatch.setattr("kbit.experiments.session.load_model", mock.Mock(side_effect=error))
    Worker(str(tmp_path), "cpu").run(make_experiment(4), find_key(make_experiment(4)))
    assert read_failures(tmp_path)["state"].tolist() == [state]


def test_plan_puts_experiments_on_one_text_together(tmp_path: Path) -> None:
    """A worker keeps the 16-bit model's states on one text only."""
    asked = []
    for bits in (3, 4):
        for text in ("a.txt", "b.txt"):
            (tmp_path / text).write_text(text)
            evaluation = dataclasses.replace(SMALL, perplexity=str(tmp_path / text))
            asked.append(dataclasses.replace(make_experiment(bits), eval=evaluation))
    planned = [Path(str(e.eval.perplexity)).name for e in make_plan(asked, tmp_path / "none").to_run]
    assert planned == ["a.txt", "a.txt", "b.txt", "b.txt"]


def test_plan_does_not_count_a_failure_that_has_a_result_since(tmp_path: Path) -> None:
    done = make_experiment(4)
    for kind in ("experiments", "failures"):
        touch(tmp_path, kind, done)
    plan = make_plan([done], tmp_path)
    assert (plan.done, plan.failed, plan.to_run) == (1, 0, ())


def test_plan_does_not_count_other_results_of_the_store(tmp_path: Path) -> None:
    touch(tmp_path, "experiments", make_experiment(8))
    assert make_plan([make_experiment(4)], tmp_path).done == 0


def test_plan_runs_large_models_first_and_keeps_each_together(tmp_path: Path) -> None:
    models = ["nano-neox-98k", "nano-neox-1m", "nano-neox-332k"]
    plan = make_plan([make_experiment(bits, model) for bits in (4, 5) for model in models], tmp_path)
    assert [e.model.name for e in plan.to_run] == [
        *["nano-neox-1m"] * 2,
        *["nano-neox-332k"] * 2,
        *["nano-neox-98k"] * 2,
    ]


def test_an_option_without_effect_is_no_experiment_of_its_own(tmp_path: Path) -> None:
    quants = [QuantConfig(data_type="int", exponent_bits=exponent_bits) for exponent_bits in (1, 2, 3)]
    plan = make_plan([Experiment(quant=quant) for quant in quants], tmp_path)
    assert (plan.asked, len(plan.to_run)) == (3, 1)


def test_experiments_run_and_are_stored(tmp_path: Path) -> None:
    plan, failures = run([make_experiment(bits) for bits in (3, 8, 16)], tmp_path)
    assert failures == []
    losses = read_results(tmp_path).query("metric == 'cross_entropy'").set_index("bits")["value"]
    assert losses[3] > losses[16]
    assert abs(losses[8] - losses[16]) < 0.1 * (losses[3] - losses[16])  # the weights are restored in between
    assert make_plan(plan.keys, tmp_path).to_run == ()


def test_model_with_nan_fails_and_the_others_finish(tmp_path: Path, nan_model: Path) -> None:
    good, bad = make_experiment(4), make_experiment(4, str(nan_model))
    _, failures = run([bad, good], tmp_path / "results")
    assert [outcome.experiment for outcome in failures] == [bad]
    assert Store(tmp_path / "results").finished_keys() == {find_key(good)}
    reason = read_failures(tmp_path / "results").set_index("key").loc[find_key(bad), "reason"]
    assert "gpt_neox.layers.0.attention.dense.weight (3 of " in str(reason)


def test_truncated_weights_fail_and_the_others_finish(tmp_path: Path, truncated_model: Path) -> None:
    good, bad = make_experiment(4), make_experiment(4, str(truncated_model))
    _, failures = run([bad, good], tmp_path / "results")
    assert [outcome.experiment for outcome in failures] == [bad]
    assert str(truncated_model) in failures[0].error
    assert Store(tmp_path / "results").finished_keys() == {find_key(good)}


def test_quantizer_that_fails_leaves_the_model_intact_for_the_next(tmp_path: Path) -> None:
    good = make_experiment(4)
    bad = dataclasses.replace(good, quant=QuantConfig(bits=4, exclude="mlp", data_type="int"))
    _, failures = run([bad, good], tmp_path / "both")
    run([good], tmp_path / "alone")
    assert ["quant.min_coverage=0.9" in outcome.error for outcome in failures] == [True]
    both, alone = (read_results(tmp_path / name)["value"].tolist() for name in ("both", "alone"))
    assert both == alone


def test_device_that_is_not_there_is_a_failure_not_another_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    outcome = Worker(str(tmp_path), "cuda").run(make_experiment(4), find_key(make_experiment(4)))
    assert "there are 0 CUDA devices here" in outcome.error
    assert Store(tmp_path).finished_keys() == set()


def test_what_another_driver_has_finished_is_not_run_again(tmp_path: Path) -> None:
    done = make_experiment(4)
    touch(tmp_path, "experiments", done)
    worker = Worker(str(tmp_path), "no device at all")
    assert worker.run(done, find_key(done)) == Outcome(done, "")


def test_a_store_that_takes_nothing_ends_the_sweep_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFiles, "create", refuse)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left on device"):
        run([make_experiment(4), make_experiment(5)], tmp_path)
    assert list_keys(tmp_path) == (set(), set())


def test_a_store_that_cannot_be_compacted_does_not_stop_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kbit.engine.progress.MANY_FILES", 1)
    touch(tmp_path, "experiments", make_experiment(8))  # an empty file
    plan = make_plan([make_experiment(4), make_experiment(5)], tmp_path)
    outcomes = (Outcome(experiment, "") for experiment in plan.to_run)
    with pytest.warns(DamagedRecordWarning, match="is damaged"):
        assert follow(outcomes, plan, Store(tmp_path)) == []
    monkeypatch.setattr(Store, "compact", mock.Mock(side_effect=OSError("the disk is full")))
    follow((Outcome(experiment, "") for experiment in plan.to_run), plan, Store(tmp_path))
    assert "was not compacted: the disk is full" in capsys.readouterr().err


def test_progress_says_what_is_left_by_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (make_experiment(4, f"nano-neox-{size}") for size in ("98k", "1m"))
    plan = make_plan([small, dataclasses.replace(small, quant=QuantConfig(bits=3)), large], tmp_path / "none")
    assert plan.to_run[0] == large
    took = {large: 600.0, small: 120.0}  # the third is like the second

    def outcomes() -> Generator[Outcome]:
        for experiment in plan.to_run:
            yield Outcome(experiment, "", seconds=took.get(experiment, 120.0))

    follow(outcomes(), plan)
    lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    by_cost = 2 * 600 * 231_168 / 1_298_016  # seconds, until one of the small model was measured
    assert lines == [f"done, about {format_seconds(by_cost)} left", "done, about 2 min left", "done"]


def test_time_left_falls_while_the_last_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = plan = make_plan([make_experiment(bits) for bits in (3, 4, 5)], tmp_path / "none").to_run
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(plan, Estimator())
    now = 1000.0  # Ray started, and both workers
    progress.take(Outcome(first, "", working=(second,), seconds=100.0))  # the second is as far as the first was
    now = 1060.0
    progress.take(Outcome(second, "", working=(third,), seconds=100.0))  # the third runs for 60 s
    lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["done, about 2 min left", "done, about 40 s left"]


def test_a_worker_imports_before_its_first_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.experiments.session", sys.modules["kbit.experiments.session"])  # put back afterwards
    monkeypatch.delitem(sys.modules, "kbit.experiments.session")
    Worker(str(tmp_path), "cpu")
    assert "kbit.experiments.session" in sys.modules


def test_lines_tell_evaluations_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_experiment(4)
    other = dataclasses.replace(one, eval=dataclasses.replace(one.eval, perplexity_windows=3))
    plan = make_plan([one, other], tmp_path / "none")
    follow((Outcome(experiment, "") for experiment in plan.to_run), plan)
    windows = [one.eval.perplexity_windows, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"[{k + 1}/2] {one.label()} perplexity_windows={windows[k]}: done" for k in range(2)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(("a", "b"), "a,b"), ((), "none"), (FeatureConfig(measure=True), "measure=True"), (None, "None")],
)
def test_values_are_shown_in_a_few_characters(value: object, text: str) -> None:
    assert show_value(value) == text


def test_progress_says_nothing_of_time_before_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan([make_experiment(4), make_experiment(5)], tmp_path / "none")
    outcomes = (Outcome(experiment, "broken", seconds=3.0) for experiment in plan.to_run)
    assert len(follow(outcomes, plan)) == 2
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["broken", "broken"]


def test_each_experiment_has_a_log(tmp_path: Path) -> None:
    """Of all that its process prints, C code included, if the process is a worker's own."""
    path = tmp_path / "logs" / "0.log"
    with log_output(path, "first", redirect=True):
        os.write(2, b"from below Python\n")
    with log_output(path, "again", redirect=False):
        os.write(2, b"of the terminal\n")
    assert re.sub(r"\S+ (first|again)", r"\1", path.read_text()) == "first\nfrom below Python\nagain\n"
    with log_output(None, "a store behind a URL", redirect=True):
        pass
