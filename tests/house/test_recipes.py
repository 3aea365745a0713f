"""CONTRIBUTING's recipes, as they stand there: a data type, a scale format, a method and a measure of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from import_graph import ROOT

import kbit
from kbit.methods.config import METHODS
from kbit.methods.quantize_model import METHOD_FUNCTIONS
from kbit.numerics.data_types import DATA_TYPES, make_codebook
from kbit.numerics.scale_formats import SCALE_FORMATS
from kbit.store.readers import read_results

RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
REGISTRIES: tuple[dict[str, Any], ...] = (DATA_TYPES, SCALE_FORMATS, METHODS, METHOD_FUNCTIONS)


@pytest.fixture
def registries_kept() -> Iterator[None]:
    """Remove what a recipe registers."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def find_recipe(word: str) -> str:
    recipe: str
    (recipe,) = (text for text in RECIPES if word in text)
    assert recipe.count("\n") < 40
    return recipe


@pytest.mark.usefixtures("registries_kept")
def test_a_data_type() -> None:
    exec(find_recipe("register_data_type"), {})
    spec = kbit.QuantSpec(bits=3, data_type="cubic", block_size=16)
    assert make_codebook("cubic", 3).tolist() == pytest.approx([-1, -8 / 27, -1 / 27, 0, 1 / 27, 8 / 27, 1])
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scales = x.view(-1, 16).abs().amax(1, keepdim=True).half().float()
    values = (kbit.fake_quantize(x, spec).view(-1, 16) / scales).flatten()
    assert all(min(abs(v - c) for c in make_codebook("cubic", 3).tolist()) < 1e-6 for v in values.tolist())
    assert spec.label() == "cubic3"


@pytest.mark.usefixtures("registries_kept")
def test_a_scale_format() -> None:
    exec(find_recipe("register_scale_format"), {})
    spec = kbit.QuantSpec(bits=4, data_type="nf", block_size=16, scale_format="fp64")
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    exact = kbit.QuantSpec(bits=4, data_type="nf", block_size=16, scale_format="fp32")
    assert torch.equal(kbit.fake_quantize(x, spec), kbit.fake_quantize(x, exact))
    assert spec.count_bits(x.shape) == 160 * 4 + 10 * 64


@pytest.mark.usefixtures("registries_kept")
def test_a_method(build_tiny: Callable[..., Any]) -> None:
    exec(find_recipe("register_method"), {})
    model, config = build_tiny("llama"), kbit.QuantConfig(bits=3, data_type="nf", block_size=16, method="clipped")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    report = kbit.quantize_model(model, config)
    name = "model.layers.0.mlp.down_proj.weight"
    clipped = before[name].clamp(-3 * before[name].std(), 3 * before[name].std())
    assert torch.equal(model.get_parameter(name), kbit.fake_quantize(clipped, config.spec))
    assert report.bits_per_param == 4


@pytest.mark.usefixtures("registries_kept")
def test_a_method_keeps_the_outliers_as_they_were(build_tiny: Callable[..., Any]) -> None:
    exec(find_recipe("register_method"), {})
    model, name = build_tiny("llama"), "model.layers.0.mlp.down_proj.weight"
    before = model.get_parameter(name).detach().clone()
    fields: dict[str, Any] = {"outlier_fraction": 0.05, "outlier_selection": "column"}
    config = kbit.QuantConfig(bits=3, data_type="nf", block_size=16, method="clipped", **fields)
    codes: Any = kbit.quantize_model(model, config, keep_codes=True).codes[name]
    assert torch.equal(codes.outlier_values, before[:, codes.outlier_columns])
    assert torch.equal(codes.dequantize(), model.get_parameter(name))


def test_a_measure(kbit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "repetition.py").write_text(find_recipe("Measure"))
    study = (
        "model.name=nano-neox-98k,nano-neox-332k",
        "quant.bits=3,4,16",
        "eval.tasks=[]",
        "eval.perplexity_windows=8",
    )
    done = kbit("run", "-m", "hydra/launcher=basic", *study, "eval.measures=[repetition.py:Repetition]")
    assert done.code == 0, done.err
    shares = read_results(tmp_path / "results").query("task == 'repetition'")["value"]
    assert len(shares) == 6
    assert all(0 <= share <= 0.5 for share in shares)
    drawn = kbit("figures", "figure_2", "--measure", "repetition/share")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "figures" / "figure_2_repetition_share.png").exists()
    near = kbit("figures", "figure_2", "--measure", "repetition/shares")
    assert near.code == 1
    assert "did you mean repetition/share?" in near.err
