"""Emergent features: a model with planted ones is the ground truth; streaming, ablation and correlation by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import plant_features
from scipy import stats

from kbit.data.windows import Windows
from kbit.evaluation import outlier_features as features
from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.evaluation.outlier_features import find_features, measure_ablation, measure_features, measure_proxy, observe
from kbit.evaluation.perplexity import measure_cross_entropy, run_trunk
from kbit.evaluation.token_budget import TokenBudget
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.session import Session
from kbit.methods.config import CacheConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.config import ModelConfig
from kbit.store.readers import read_features, read_results
from kbit.store.store import Store

Build = Callable[..., Any]

PLANTED = [7, 41]
CRITERIA = FeatureConfig(measure=True)
BUDGET = TokenBudget(10_000)


def make_windows(count: int = 6, length: int = 33) -> Windows:
    tokens = torch.randint(1, 259, (count, length), generator=torch.Generator().manual_seed(0))
    return Windows("toy", "", tokens, 1.0)


def record(model: Any, windows: Windows, modules: list[str]) -> list[torch.Tensor]:
    """The inputs [tokens, width] of modules, in one forward pass."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].detach().flatten(0, -2))
        )
        for name in modules
    ]
    with torch.no_grad():
        model(windows.tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in modules]


STREAM = [f"model.decoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "fc1")]


def found(seen: Any, **criteria: float) -> list[int]:
    return [f.dimension for f in find_features(seen, FeatureConfig(measure=True, **criteria)) if f.is_feature]


def test_exactly_the_planted_features_are_found(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    assert found(observe(model, windows, BUDGET, 6.0)) == []
    plant_features(model, PLANTED, 64.0, [0, 1])
    leading, measured = measure_features(model, windows, BUDGET, CRITERIA)
    assert sorted(f.dimension for f in leading if f.is_feature) == PLANTED
    values = {m.metric: m.value for m in measured if m.task == "features/toy"}
    assert values["features"] == 2
    assert values["layers_affected"] == 1
    inputs = torch.stack(record(model, windows, STREAM))  # [inputs, tokens, hidden]
    large = inputs.abs() >= 6
    for feature in leading:
        share = large[:, :, feature.dimension].double().mean()
        assert feature.positions == pytest.approx(float(share), abs=1e-12)
        assert len(feature.by_layer) == 4
        largest = [float(x[:, feature.dimension].abs().max()) for x in inputs]
        assert [abs(place.largest) for place in feature.by_layer] == pytest.approx(largest)
    assert values["positions_affected"] == max(f.positions for f in leading)
    assert values["largest_activation"] == pytest.approx(float(inputs.abs().max()))
    pooled = inputs[:, :, PLANTED][large[:, :, PLANTED]]
    for name, q in [("q1", 0.25), ("median", 0.5), ("q3", 0.75)]:
        direct = float(pooled.quantile(q, interpolation="lower"))
        assert values[f"magnitude_{name}"] == pytest.approx(direct, rel=0.011)  # half a bin of 2%


def test_each_criterion_counts(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    plant_features(model, PLANTED, 64.0, [1])  # in one layer of two
    seen = observe(model, windows, BUDGET, 6.0)
    assert sorted(found(seen)) == PLANTED
    assert found(seen, layers=0.51) == []
    share = float(find_features(seen, CRITERIA)[0].positions)
    assert 0.4 < share < 0.5  # of the inputs of both layers
    assert found(seen, positions=0.51) == []
    assert found(observe(model, windows, BUDGET, 600.0)) == []


def test_a_feature_of_one_sign_is_one_sided(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    for layer in model.model.decoder.layers:
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            with torch.no_grad():
                norm.bias[5] = -40.0
                norm.weight[9] = 40.0
    leading = {f.dimension: f for f in find_features(observe(model, windows, BUDGET, 6.0), CRITERIA)}
    assert leading[5].one_sided
    assert not leading[9].one_sided
    assert max(leading[5].quartiles) < -30


def test_streaming_changes_nothing_and_memory_does_not_grow(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    plant_features(model, PLANTED, 64.0, [0, 1])
    whole, pieces = (observe(model, windows, TokenBudget(tokens), 6.0) for tokens in (10_000, 1))
    more = observe(model, make_windows(24), TokenBudget(64), 6.0)
    assert whole.positions == pieces.positions == 6 * 32
    assert whole.histogram is not None
    assert pieces.histogram is not None
    assert more.histogram is not None
    assert (whole.histogram - pieces.histogram).abs().sum() <= 4  # a sum in another order may move a value by a bin
    for place, extremes in whole.inputs.items():
        assert torch.allclose(extremes.high, pieces.inputs[place].high, rtol=1e-5, atol=1e-6)
        assert torch.equal(extremes.large, pieces.inputs[place].large)
        assert more.inputs[place].high.shape == extremes.high.shape
    assert more.histogram.shape == whole.histogram.shape
    assert len(more.inputs) == len(whole.inputs) == 8


def test_a_text_that_is_read_in_pieces_is_seen_whole(build_tiny: Build) -> None:
    """Channels of a cache share scales in blocks of 8 tokens, so that the trunk is called for 8 tokens at a time."""
    model, windows = build_tiny("opt"), make_windows(count=2)
    quantize_model(model, QuantConfig(bits=16, kv_cache=CacheConfig(bits=8, keys="channel", block_tokens=8)))
    pieces: list[torch.Tensor] = []
    hook = model.get_submodule("model.decoder.layers.1.fc1").register_forward_pre_hook(
        lambda _, inputs: pieces.append(inputs[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        model(windows.tokens[:, :-1])
    hook.remove()
    whole = torch.cat(pieces)
    assert len(pieces) == 4
    assert len(whole) == 64
    seen = observe(model, windows, BUDGET, magnitude=1.0).inputs[1, "feed_forward"]
    assert torch.equal(seen.high, whole.amax(0))
    assert torch.equal(seen.low, whole.amin(0))
    assert torch.equal(seen.large, (whole.abs() >= 1).sum(0))
    assert not torch.equal(seen.high, pieces[-1].amax(0))


def test_a_batch_that_runs_out_of_memory_is_not_counted_twice(
    build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = build_tiny("opt"), make_windows()
    expected = observe(model, windows, TokenBudget(99), 2.0)  # three windows at once
    real, failures = run_trunk, iter([True])

    def fail_once(*arguments: Any) -> torch.Tensor:
        hidden = real(*arguments)
        if next(failures, False):
            raise torch.OutOfMemoryError
        return hidden

    monkeypatch.setattr(features, "run_trunk", fail_once)
    seen = observe(model, windows, TokenBudget(198), 2.0)
    assert seen.positions == expected.positions
    for place, extremes in expected.inputs.items():
        assert torch.equal(seen.inputs[place].large, extremes.large)


def test_ablation_is_zeroing_the_columns_of_the_readers(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    measured = {m.metric: m for m in measure_ablation(model, windows, BUDGET, PLANTED, "t")}
    with torch.no_grad():
        logits = model(windows.tokens[:, :-1]).logits
        confidence = logits.softmax(-1).amax(-1).mean()
        for name in [*STREAM, *(n.replace("q_proj", other) for n in STREAM for other in ("k_proj", "v_proj"))]:
            model.get_submodule(name).weight[:, PLANTED] = 0
    assert measured["top1_probability"].value == pytest.approx(float(confidence), rel=1e-5)
    assert "cross_entropy" not in measured
    [loss] = [m for m in measure_cross_entropy(model, windows, BUDGET).measurements if m.metric == "cross_entropy"]
    assert measured["cross_entropy_without_features"].value == pytest.approx(loss.value, rel=1e-6)
    assert measured["cross_entropy_without_random"].value != pytest.approx(loss.value, rel=1e-6)
    assert {m.metric for m in measure_ablation(model, windows, BUDGET, [], "t")} == {"top1_probability"}


def test_there_is_no_control_of_fewer_dimensions(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows(2)
    width = model.get_output_embeddings().weight.shape[1]
    for count, has_control in [(width // 2, True), (width // 2 + 1, False), (width, False)]:
        measured = {m.metric for m in measure_ablation(model, windows, BUDGET, range(count), "t")}
        assert "cross_entropy_without_features" in measured
        assert ("cross_entropy_without_random" in measured) == has_control


def test_ablation_leaves_no_hook(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows(2)
    measure_features(model, windows, BUDGET, CRITERIA)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_correlation_is_spearmans_of_deviation_and_largest_magnitude(build_tiny: Build) -> None:
    model, windows = build_tiny("opt"), make_windows()
    measured = {m.task: m for m in measure_proxy(model, observe(model, windows, BUDGET, 6.0))}
    assert set(measured) == {"proxy/feed_forward", "proxy/attention", "proxy/control"}
    layers = "model.decoder.layers.{}."
    for task, source, reader in [
        ("proxy/feed_forward", "self_attn.out_proj", "fc1"),
        ("proxy/attention", "self_attn.v_proj", "self_attn.out_proj"),
        ("proxy/control", "fc1", "fc2"),
    ]:
        by_layer = []
        for i in (0, 1):
            deviation = model.get_submodule(layers.format(i) + source).weight.detach().std(1)
            [inputs] = record(model, windows, [layers.format(i) + reader])
            by_layer.append(stats.spearmanr(deviation, inputs.abs().amax(0)).statistic)
        assert measured[task].value == pytest.approx(sum(by_layer) / 2, abs=0.01)  # near ties may swap
        assert measured[task].n == 2


def test_the_first_block_of_parallel_residuals_has_no_layer_before(build_tiny: Build) -> None:
    model, windows = build_tiny("gpt_neox"), make_windows(2)
    measured = {m.task: m.n for m in measure_proxy(model, observe(model, windows, BUDGET, 6.0))}
    assert measured == {"proxy/attention": 2, "proxy/feed_forward": 1, "proxy/control": 2}


def test_features_are_part_of_an_experiment_and_its_store(tmp_path: Path) -> None:
    model = ModelConfig("nano-opt-98k")
    config = EvalConfig(tasks=(), perplexity_windows=2, features=FeatureConfig(measure=True, magnitude=2.5))
    result = Session(model).run(Experiment(model, QuantConfig(bits=16), config))
    Store(tmp_path).write(result)
    table = read_results(tmp_path)
    assert {"features/nano_held_out", "proxy/feed_forward"} <= set(table["task"])
    places = read_features(tmp_path)
    assert set(places["input"]) == {"attention", "feed_forward"}
    assert places["dimension"].nunique() == len(result.features) >= 8
    counted = table.query("metric == 'features'")["value"].iloc[0]
    assert counted == places.loc[places["is_feature"], "dimension"].nunique() > 0
    assert (places["layer"] < 2).all()


def test_the_command_prints_what_it_finds(kbit: Callable[..., Any]) -> None:
    done = kbit("outliers", "model.name=nano-opt-98k", "eval.perplexity_windows=1", "eval.features.magnitude=3")
    assert done.code == 0, done.err
    assert "features/nano_held_out" in done.out
    assert "of positions; up to" in done.out


def content_keys() -> Iterator[str]:
    for fields in ({}, {"measure": True}, {"measure": True, "layers": 0.5}):
        yield find_key(Experiment(eval=EvalConfig(features=FeatureConfig(**fields))))


def test_criteria_are_content_only_where_features_are_looked_for() -> None:
    plain, measured, other = content_keys()
    assert plain == find_key(Experiment())
    assert len({plain, measured, other}) == 3
    assert find_key(Experiment(eval=EvalConfig(features=FeatureConfig(layers=0.5)))) == plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"magnitude": 0.0}, "magnitude=0 is not a finite number > 0"),
        ({"layers": 1.1}, "layers=1.1"),
        ({"positions": -1.0}, "in 0..1"),
    ],
)
def test_bad_criteria_are_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FeatureConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eval\.features\.measure needs a text"):
        dataclasses.replace(EvalConfig(), perplexity=None, features=CRITERIA)


def test_an_architecture_that_is_not_known_is_named(build_tiny: Build) -> None:
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        measure_features(build_tiny("mixtral"), make_windows(1), BUDGET, CRITERIA)
