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
def results(tmp_path_factory: pytest.TempPathFactory, run_kbit: Callable[..., Any]) -> pd.DataFrame:
    """The store of all presets and of the baseline, measured on eight windows of the held-out text in one process."""
    folder = tmp_path_factory.mktemp("presets")
    grids = f"study.grids=[{{quant:[{','.join(NAMES)}]}},{{quant.bits:16}}]"
    small = ("eval.tasks=[]", "eval.perplexity_windows=8", "hydra/launcher=basic")
    done = run_kbit("run", "-m", grids, *small, cwd=folder)
    assert done.code == 0, done.err
    return read_results(folder / "results")


def test_every_preset_has_a_result(results: pd.DataFrame) -> None:
    # default is nf4, so there is one quantizer less than there are names; and the baseline
    assert results["key"].nunique() == len(NAMES) - 1 + 1


def test_every_preset_costs_what_its_bits_allow(results: pd.DataFrame) -> None:
    """The loss over the baseline is small and finite, and no quantizer of 6 or more bits loses 0.05 nats."""
    loss = results[results["metric"] == "cross_entropy"].set_index("key")
    baseline = loss.loc[loss["bits"] == 16, "value"].item()
    lost = loss["value"] - baseline
    assert lost.between(-0.02, 0.5).all()
    assert (lost[loss["bits"] >= 6] < 0.05).all()
