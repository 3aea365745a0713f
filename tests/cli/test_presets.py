"""Every named quantizer of conf/quant runs through `kbit run quant=...` on an embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kbit.store.readers import read_results

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "quant").glob("*.yaml"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, run_kbit: Callable[..., Any]) -> tuple[Path, Any]:
    """The folder of a multirun on Ray of all presets and the baseline on four windows, and how it ended.

    HOME is not set, as in many containers.
    """
    folder = tmp_path_factory.mktemp("presets")
    grids = f"study.grids=[{{quant:[{','.join(NAMES)}]}},{{quant.bits:16}}]"
    small = ("eval.tasks=[]", "eval.perplexity_windows=4", "ray.num_workers=1")
    return folder, run_kbit("run", "-m", grids, *small, cwd=folder, without=["HOME"])


@pytest.fixture(scope="module")
def results(sweep: tuple[Path, Any]) -> pd.DataFrame:
    """The store of the multirun."""
    folder, done = sweep
    assert done.code == 0, done.err
    return read_results(folder / "results")


def test_a_multirun_on_ray_runs_equal_jobs_once_and_leaves_nothing_but_the_store(sweep: tuple[Path, Any]) -> None:
    folder, done = sweep
    distinct = len(NAMES) - 1 + 1  # default is nf4, so there is one quantizer less than there are names
    assert f"{len(NAMES) + 1} asked, {distinct} distinct, 0 done, {distinct} to run" in done.out
    assert "Traceback (most recent call last)" not in done.err
    assert [path.name for path in folder.iterdir()] == ["results"]


def test_every_preset_has_a_result(results: pd.DataFrame) -> None:
    assert results["key"].nunique() == len(NAMES) - 1 + 1


def test_every_preset_costs_what_its_bits_allow(results: pd.DataFrame) -> None:
    """The loss over the baseline is small and finite, and no quantizer of 6 or more bits loses 0.05 nats."""
    loss = results[results["metric"] == "cross_entropy"].set_index("key")
    baseline = loss.loc[loss["bits"] == 16, "value"].item()
    lost = loss["value"] - baseline
    is_coarse = (loss["bits"] == 3) & (loss["rounding"] == "truncate")  # fast_m2, which is for training: it loses 0.61
    is_mix_of_two_bits = loss["bits"] == 2  # mix_q2_k, which has the embeddings in 2 bits: it loses 0.46
    assert lost[~is_coarse & ~is_mix_of_two_bits].between(-0.02, 0.5).all()
    assert lost[is_mix_of_two_bits].between(0.3, 0.6).all()
    assert lost[is_coarse].between(0.55, 0.67).all()
    assert (lost[loss["bits"] >= 6] < 0.05).all()
