"""The command line as a user meets it: what it prints, what it leaves behind, and how it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.analysis.figures.registry import FIGURES
from kbit.models.catalog import EMBEDDED
from kbit.store.readers import read_failures, read_results
from kbit.store.store import Store

SMALL = ("eval.tasks=[]", "eval.perplexity_windows=4")
BASIC = "hydra/launcher=basic"
TRACEBACK = "Traceback (most recent call last)"


Kbit = Callable[..., Any]  # the fixtures kbit and run_kbit of conftest.py


@pytest.fixture(scope="module")
def single_run(tmp_path_factory: pytest.TempPathFactory, run_kbit: Kbit) -> tuple[Path, Any]:
    """A folder with the store of a single run, and how the run ended."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run_kbit("run", "quant.bits=4", "quant.data_type=int", *SMALL, cwd=folder)


@pytest.fixture
def study(single_run: tuple[Path, Any], kbit: Kbit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, as the current one."""
    folder, _ = single_run
    monkeypatch.chdir(folder)
    return folder


def content(folder: Path) -> dict[str, int]:
    """Every file and folder, with the time it was last changed."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- running


def test_single_run_writes_one_result_and_prints_it(single_run: tuple[Path, Any]) -> None:
    folder, done = single_run
    assert (done.code, TRACEBACK in done.err) == (0, False)
    table = read_results(folder / "results")
    assert (set(table["bits"]), set(table["data_type"])) == ({4}, {"int"})
    for shown in ("nano-neox-98k", "cross_entropy", f"{table['value'].iloc[0]:.6f}", str(folder / "results")):
        assert shown in done.out
    assert [path.name for path in folder.iterdir()] == ["results"]


def test_second_start_runs_nothing_and_says_so(kbit: Kbit, study: Path) -> None:
    before = content(study)
    done = kbit("run", "-m", "quant.bits=4", "quant.data_type=int", *SMALL)  # on Ray, which is not started
    assert done.code == 0
    assert "1 asked, 1 distinct, 1 done, 0 to run" in done.out
    assert {k: v for k, v in content(study).items() if k.endswith(".json")} == {
        k: v for k, v in before.items() if k.endswith(".json")
    }


def test_float_only_option_with_int_is_one_job(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("run", "-m", "quant.data_type=int", "quant.exponent_bits=1,2,3", BASIC, *SMALL)
    assert done.code == 0
    assert "3 asked, 1 distinct, 0 done, 1 to run" in done.out
    assert len(Store(tmp_path / "results").finished_keys()) == 1


def test_basic_launcher_runs_a_grid_without_ray(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("run", "-m", "quant.bits=3,16", BASIC, *SMALL)
    assert done.code == 0
    assert "2 of 2 asked results" in done.out
    assert sorted(read_results(tmp_path / "results")["bits"].unique()) == [3, 16]
    assert "ray" not in done.err


def test_limit_keeps_the_first_items_of_each_task(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("run", "eval.tasks=[nano_choice,nano_swap]", "eval.limit=5", "eval.perplexity=null")
    assert done.code == 0
    accuracies = read_results(tmp_path / "results").query("metric == 'acc' and task != 'mean_zero_shot'")
    assert dict(zip(accuracies["task"], accuracies["n"], strict=True)) == {"nano_choice": 5, "nano_swap": 5}


def test_two_runs_in_one_process_do_not_mix(kbit: Kbit, tmp_path: Path) -> None:
    for bits in (5, 6):
        assert kbit("run", f"quant.bits={bits}", *SMALL).code == 0
    assert sorted(read_results(tmp_path / "results")["bits"].unique()) == [5, 6]


def test_settings_of_a_sweep_cannot_be_swept(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("run", "-m", "results=a,b", BASIC, *SMALL)
    assert done.code == 1
    assert "results must be the same for the whole sweep, not a and b" in done.err
    assert list(tmp_path.iterdir()) == []


# --- planning


def test_plan_says_what_would_run_and_writes_nothing(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("plan", "quant.bits=3,4,4,16", "quant.data_type=int,nf")
    assert done.code == 0
    plan, work = done.out.splitlines()
    assert plan == "8 asked, 5 distinct, 0 done, 5 to run"
    assert work.startswith("tokens to score: about ")
    assert "; time: unknown until the first result; memory: about 0.9 GB a worker" in work
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_changes_nothing_in_any_experiment_is_named(kbit: Kbit) -> None:
    note = "kbit: note: quant.exponent_bits was set and changes nothing beside quant.data_type=nf"
    assert note in kbit("plan", "quant.exponent_bits=2").err
    assert kbit("plan", "quant.exponent_bits=2", "quant.data_type=nf,float").err == ""


def test_a_key_of_a_training_that_changes_nothing_is_named(kbit: Kbit) -> None:
    note = "kbit: note: train.weights.bits was set and changes nothing at train.steps=0"
    assert note in kbit("plan", "train.weights.bits=3").err


def test_plan_counts_what_is_done(kbit: Kbit, study: Path) -> None:
    done = kbit("plan", "quant.bits=3,4", "quant.data_type=int", *SMALL)
    assert done.out.splitlines()[0] == "2 asked, 2 distinct, 1 done, 1 to run"


def test_plan_of_a_ready_study(kbit: Kbit) -> None:
    assert "78 asked, 78 distinct, 0 done, 78 to run" in kbit("plan", "+sweeps=nano/bit_level").out
    assert "24 asked, 24 distinct, 0 done, 24 to run" in kbit("plan", "+sweeps=nano/quick").out


def test_plan_works_without_ray_too(kbit: Kbit) -> None:
    assert "2 asked, 2 distinct" in kbit("plan", "quant.bits=3,4", BASIC).out


# --- reading


def test_results_are_exported_with_all_columns(kbit: Kbit, study: Path, tmp_path: Path) -> None:
    done = kbit("results", "--csv", str(tmp_path / "out.csv"))
    assert (done.code, done.out) == (0, f"5 rows written to {tmp_path / 'out.csv'}\n")  # of the text
    assert pd.read_csv(tmp_path / "out.csv").columns.tolist() == read_results(study / "results").columns.tolist()


def test_where_selects_rows(kbit: Kbit, study: Path) -> None:
    done = kbit("results", "--where", "metric == 'cross_entropy' and bits == 4")
    assert "cross_entropy" in done.out
    assert "bits_per_byte" not in done.out


def test_no_failures_is_no_error(kbit: Kbit, study: Path) -> None:
    assert kbit("results", "--failures").code == 0


def test_models_lists_embedded_and_hub_models(kbit: Kbit) -> None:
    lines = kbit("models").out.splitlines()
    assert any(line.split() == ["nano-neox-98k", "nano-neox", "embedded"] for line in lines)
    assert any(line.split() == ["opt-125m", "opt", "facebook/opt-125m"] for line in lines)


def test_version(run_kbit: Kbit, tmp_path: Path) -> None:
    done = run_kbit("--version", cwd=tmp_path)
    assert (done.code, done.out.split()[0]) == (0, "kbit")
    assert done.out.split()[1][0].isdigit()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)], ids=str)
def test_usage_names_every_command(kbit: Kbit, arguments: tuple[str, ...]) -> None:
    done = kbit(*arguments)
    assert done.code == 0
    commands = ("run", "plan", "figures", "report", "results", "outliers", "models", "doctor", "completion")
    assert [name for name in commands if not re.search(rf"^ +{name}\b", done.out, re.MULTILINE)] == []
    assert "kbit run +sweeps=nano/bit_level" in done.out


# --- refusing


def test_refusal_of_the_console_script_has_no_traceback(run_kbit: Kbit, tmp_path: Path) -> None:
    done = run_kbit("run", "quant.data_type=flaot", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert (
        done.err
        == "kbit: error: data_type='flaot' is not one of: int, float, dynamic, quantile, nf, af, learned, table; "
        "did you mean float?\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_file_where_the_store_should_be_is_refused_and_kept(kbit: Kbit, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    done = kbit("run", *SMALL)
    assert done.code == 1
    assert f"cannot write to {tmp_path / 'results'}" in done.err
    assert (tmp_path / "results").read_text() == "mine"


def test_nan_in_a_weight_is_a_failure_and_no_result(kbit: Kbit, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED / "nano-neox-98k", tmp_path / "damaged")
    path, name = tmp_path / "damaged" / "model.safetensors", "gpt_neox.layers.0.attention.dense.weight"
    weights = load_file(path)
    weights[name].view(-1)[:3] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    done = kbit("run", "model.name=damaged", *SMALL)
    assert done.code == 1
    assert f"{name} (3 of " in done.err
    assert TRACEBACK not in done.err
    assert read_results(tmp_path / "results").empty
    assert f"{name} (3 of " in read_failures(tmp_path / "results")["reason"].item()
    shown = kbit("results", "--failures")
    assert (shown.code, f"{name} (3 of " in " ".join(shown.out.split())) == (0, True)


def test_failed_experiment_is_not_tried_again_unasked(kbit: Kbit) -> None:
    low_coverage = ("quant.exclude=mlp", *SMALL)
    assert kbit("run", *low_coverage).code == 1
    again = kbit("run", *low_coverage)
    assert again.code == 1
    assert "1 failed before (retry_failed=true runs them again), 0 to run" in again.out
    assert "quant.min_coverage=0.9" in again.err


@pytest.mark.parametrize(("fail_fast", "results"), [("true", 0), ("false", 1)])
def test_fail_fast_stops_at_the_first_failure(kbit: Kbit, tmp_path: Path, fail_fast: str, results: int) -> None:
    study = ("quant.min_coverage=1", "quant.exclude=dense,null", "eval.tasks=[]", "eval.perplexity_windows=1")
    done = kbit("run", "-m", "hydra/launcher=basic", *study, f"fail_fast={fail_fast}")
    assert done.code == 1
    assert re.search(r"^failed   nano-neox-98k .* exclude=dense .*\([0-9a-f]{16}\)$", done.err, re.MULTILINE)
    assert len(re.findall(r"^not run  nano-neox-98k ", done.err, re.MULTILINE)) == 1 - results
    assert len(read_failures(tmp_path / "results")) == 1
    assert read_results(tmp_path / "results")["key"].nunique() == results


def test_unknown_command_names_the_commands(kbit: Kbit) -> None:
    done = kbit("rnu")
    assert done.code == 1
    assert "'rnu'" in done.err
    assert "run, plan, figures, report, results, outliers, fit, recommend, bench, pack, export, models" in done.err


def test_unknown_figure_names_the_figures(kbit: Kbit, study: Path) -> None:
    done = kbit("figures", "figure_99")
    assert done.code == 1
    assert "figure_99" in done.err
    assert "figure_2" in done.err
    assert not (study / "figures").exists()


def test_of_figures_asked_for_those_that_can_be_are_drawn_and_the_others_named(
    kbit: Kbit, study: Path, tmp_path: Path
) -> None:
    done = kbit("figures", "figure_16", "figure_3", "--out", str(tmp_path))
    assert done.code == 1
    assert (tmp_path / "figure_16.png").is_file()
    assert "figure_3: not drawn: " in done.out
    assert "kbit run +sweeps=nano/block_size" in done.out
    assert "not drawn: figure_3" in done.err


def test_a_figure_that_fails_is_named_and_the_others_are_written(
    kbit: Kbit, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(results: object, page: object) -> None:
        raise TypeError("'<' not supported")

    three = {"verdicts": fail} | {name: FIGURES[name] for name in ("figure_16", "figure_3")}
    monkeypatch.setattr("kbit.analysis.figures.registry.FIGURES", three)
    done = kbit("figures", "--out", str(tmp_path))
    assert done.code == 1
    assert "verdicts: not drawn: TypeError: '<' not supported (test_main.py, line " in done.out
    assert (tmp_path / "figure_16.png").is_file()
    assert re.search(r"Not drawn, as these results lack what they show .*:\n  figure_3\n", done.out)
    assert done.err.splitlines()[-1].endswith("not drawn: verdicts")


@pytest.mark.parametrize("command", ["figures", "report", "results"])
def test_missing_store_is_named(kbit: Kbit, tmp_path: Path, command: str) -> None:
    done = kbit(command)
    assert done.code == 1
    assert f"no results at {tmp_path / 'results'}: start with `kbit run`" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["bits ===", "bitz == 4"])
def test_bad_query_is_named_with_the_columns(kbit: Kbit, study: Path, where: str) -> None:
    done = kbit("results", "--where", where)
    assert done.code == 1
    assert where in done.err
    assert "data_type" in done.err
    assert TRACEBACK not in done.err


def test_figures_of_no_row_are_refused_and_leave_nothing(kbit: Kbit, study: Path) -> None:
    done = kbit("figures", "--where", "bits == 7", "--out", "some/where")
    assert done.code == 1
    assert "--where 'bits == 7' finds none of the rows of results" in done.err
    assert "No results yet" not in done.out + done.err
    assert not (study / "some").exists()


def test_export_makes_its_folder(kbit: Kbit, study: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        path = tmp_path / suffix / "deep" / f"out.{suffix}"
        assert kbit("results", f"--{suffix}", str(path)).code == 0
        assert path.is_file()


def test_a_store_is_not_merged_into_itself(kbit: Kbit, study: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(study / "results")
    for same in ("results", "./results/", str(study / "results"), str(tmp_path / "link")):
        done = kbit("results", "merge", same)
        assert (done.code, f"{same} is results itself" in done.err) == (1, True)


def test_help_of_outliers_is_its_own(kbit: Kbit) -> None:
    done = kbit("outliers", "--help")
    assert (done.code, "usage: kbit outliers" in done.out, "eval.features.magnitude" in done.out) == (0, True, True)


def test_a_list_of_studies_is_a_multirun(kbit: Kbit, tmp_path: Path) -> None:
    for number in (3, 4):
        folder = tmp_path / "studies" / "sweeps"
        folder.mkdir(parents=True, exist_ok=True)
        text = f"# @package _global_\nquant: {{bits: {number}}}\nresults: {tmp_path}/store\n"
        (folder / f"bits{number}.yaml").write_text(text)
    done = kbit("run", "--config-dir", "studies", "+sweeps=bits3,bits4", "hydra.launcher.plan_only=true")
    assert (done.code, "2 asked, 2 distinct" in done.out) == (0, True)


def test_settings_without_effect_are_said(kbit: Kbit) -> None:
    done = kbit("plan", BASIC, "eval.perplexity=null", "ray.num_workers=4", "quant.bits=3,4")
    assert done.code == 0
    assert done.err.splitlines() == [
        "kbit: note: ray.num_workers=4 has no effect: a single run, and hydra/launcher=basic, go without Ray",
    ]
    assert kbit("plan", "quant.bits=3,4", "ray.num_workers=4").err == ""


def test_the_best_that_fits_is_recommended(kbit: Kbit, study: Path, tmp_path: Path) -> None:
    done = kbit("recommend", "--memory", "1MB", "--context", "128", "--csv", str(tmp_path / "all.csv"))
    assert done.code == 0
    assert "measured models and quantizers fit into 1MB at a context of 128 tokens and batch 1." in done.out
    table = pd.read_csv(tmp_path / "all.csv")
    best = table.loc[table["fits"], "value"].max()
    assert f"Take {table['model'].iloc[0]} {table['variant'].iloc[0]}: " in done.out
    assert table["value"].iloc[0] == best
    coarse = kbit("recommend", "--memory", "1GB", "--context", "128", "--where", "bits == 3")
    assert "16-bit" not in coarse.out  # a baseline is no choice that was asked for
    refused = kbit("recommend", "--memory", "elephant")
    assert (refused.code, "--memory 'elephant' is neither an amount of memory" in refused.err) == (1, True)
