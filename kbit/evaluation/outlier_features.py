"""Emergent outlier features: hidden dimensions with large values in many layers and at many positions, in one pass.

LLM.int8() (Dettmers et al. 2022, section 4) looks at the hidden states that attention and the feed-forward layer read.
It calls a dimension an outlier feature if the dimension has

    a value of magnitude >= 6 in at least 25% of the layers (at either of a layer's two inputs), and
    such values at at least 6% of all positions. This is the share of (input, position) pairs: so read the shares of
    the paper's Table 4, as none is above the same model's share of layers.

The text is streamed. Counts and extremes are kept for each input and dimension, and for each dimension a histogram of
the values beyond the magnitude. Memory therefore does not depend on the length of the text.

The same pass measures what proxy quantization rests on (k-bit paper, Table 2): Spearman's correlation, over the units
of a layer, between the standard deviation of a unit's incoming weights and the largest magnitude that the unit takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.data.windows import Windows
from kbit.evaluation.config import FeatureConfig
from kbit.evaluation.logits import Normalizer, iterate_logits, score_targets
from kbit.evaluation.measure import Measure, Measured, Subject
from kbit.evaluation.measurement import Feature, Layer, Measurement, measure_mean
from kbit.evaluation.perplexity import iterate_windows, run_trunk
from kbit.evaluation.scorer import splits_at_head
from kbit.evaluation.token_budget import TokenBudget
from kbit.models.architectures import DecoderLayer, find_sources, list_decoder_layers, measure_deviation

STREAM: Final = ("attention", "feed_forward")  # inputs that read the residual stream
RECORDED: Final = 8  # at least so many leading dimensions are recorded, features or not
_BIN: Final = 1.02  # the ratio of neighbouring edges of the histogram: quartiles are exact to 1%
_BINS: Final = 700  # to 6 * 1.02^700 = 6 million


class OutlierFeatures(Measure):
    """The emergent outlier features of eval.features, on the windows of eval.perplexity."""

    name = "outlier_features"
    fields = ("features", "perplexity", "perplexity_windows")

    def run(self, subject: Subject) -> Measured:
        """Look for features if eval.features asks for it.

        Raises:
            ValueError: see measure_features and Subject.make_windows.
        """
        if not subject.config.features.measure:
            return Measured()
        windows, criteria = subject.make_windows(), subject.config.features
        features, measurements = measure_features(subject.model, windows, subject.scorer.budget, criteria)
        return Measured(measurements, records={"features": tuple(features)})


@dataclass
class _Extremes:
    """The extremes of each dimension of one input.

    Attributes:
        high, low: the largest and the smallest value [width].
        large: int64 [width], the number of positions at which the value is large.
    """

    high: Tensor
    low: Tensor
    large: Tensor

    def add(self, other: _Extremes) -> None:
        torch.maximum(self.high, other.high, out=self.high)
        torch.minimum(self.low, other.low, out=self.low)
        self.large += other.large

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude [width]."""
        return torch.maximum(self.high, -self.low)


@dataclass
class Observations:
    """What a pass over a text has seen so far.

    Attributes:
        magnitude: the least magnitude of a large value.
        positions: the number of tokens seen.
        inputs: (layer, input) -> extremes, where input is one of STREAM, attention_out or feed_forward_out.
        histogram: int64 [hidden, 2 * bins], the counts of large values: negative ones first, each by rising magnitude.
    """

    magnitude: float
    positions: int = 0
    inputs: dict[tuple[int, str], _Extremes] = field(default_factory=dict)
    histogram: Tensor | None = None

    def add(self, seen: dict[tuple[int, str], _Extremes], large: list[tuple[Tensor, Tensor]], positions: int) -> None:
        """Take in a batch.

        Args:
            seen: the extremes of each input.
            large: (dimensions, values) of the large values, for each input of the stream.
            positions: the number of tokens in the batch.
        """
        self.positions += positions
        for place, extremes in seen.items():
            if place in self.inputs:
                self.inputs[place].add(extremes)
            else:
                self.inputs[place] = extremes
        if self.histogram is None:
            width = len(self.inputs[0, STREAM[0]].high)
            self.histogram = torch.zeros(width, 2 * _BINS, dtype=torch.int64)
        for dimensions, values in large:
            places = (values.abs() / self.magnitude).log_().div_(math.log(_BIN)).long().clamp_(0, _BINS - 1)
            flat = (dimensions * 2 * _BINS + places + (values > 0) * _BINS).cpu()
            self.histogram.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def list_stream(self) -> list[tuple[int, str]]:
        """Return the inputs of the stream in order."""
        return [place for place in self.inputs if place[1] in STREAM]


def observe(model: Any, windows: Windows, budget: TokenBudget, magnitude: float) -> Observations:
    """Stream a text through a model and return what the inputs of its layers were.

    Raises:
        ValueError: kbit.models.architectures does not know the model's architecture.
    """
    observations = Observations(magnitude)
    pending: dict[tuple[int, str], _Extremes] = {}
    large: list[tuple[Tensor, Tensor]] = []

    def keep(place: tuple[int, str], x: Tensor) -> None:
        values = x.detach().float().flatten(0, -2)
        is_large = values.abs() >= magnitude
        extremes = _Extremes(values.amax(0).cpu(), values.amin(0).cpu(), is_large.sum(0).cpu())
        if place in pending:  # a text is read in pieces (quant.kv_cache.keys=channel)
            pending[place].add(extremes)
        else:
            pending[place] = extremes
        if place[1] in STREAM:
            large.append((is_large.nonzero()[:, 1], values[is_large]))

    def run(rows: slice) -> Tensor:
        pending.clear()  # an earlier attempt may have run out of memory half-way
        large.clear()
        return run_trunk(model, windows.tokens[rows])

    with torch.no_grad(), _hooks(_list_inputs(list_decoder_layers(model)), model, keep):
        for _, hidden in iterate_windows(model, windows, budget, run):
            observations.add(dict(pending), large, hidden[..., 0].numel())
    return observations


def find_features(seen: Observations, criteria: FeatureConfig) -> list[Feature]:
    """Return the leading dimensions: all features, then others up to RECORDED in all, most often large first."""
    stream = seen.list_stream()
    large = torch.stack([seen.inputs[place].large for place in stream])  # [inputs, hidden]
    layers = torch.tensor([layer for layer, _ in stream])
    count = int(layers.max()) + 1
    by_layer = torch.zeros(count, large.shape[1], dtype=torch.int64).index_add_(0, layers, large)
    layer_share = (by_layer > 0).double().mean(0)
    position_share = large.double().sum(0) / (len(stream) * seen.positions)
    is_feature = (layer_share >= criteria.layers) & (position_share >= criteria.positions)
    magnitude = torch.stack([seen.inputs[place].magnitude for place in stream]).amax(0)
    # Equally frequent dimensions, such as those that are never large, come by their largest magnitude.
    order = sorted(range(large.shape[1]), key=lambda d: (-float(position_share[d]), -float(magnitude[d])))
    wanted = max(RECORDED, int(is_feature.sum()))
    leading = [d for d in order if is_feature[d]] + [d for d in order if not is_feature[d]]
    return [
        _describe(seen, d, bool(is_feature[d]), float(layer_share[d]), float(position_share[d]))
        for d in leading[:wanted]
    ]


def measure_features(
    model: Any, windows: Windows, budget: TokenBudget, criteria: FeatureConfig
) -> tuple[list[Feature], list[Measurement]]:
    """Find a model's outlier features on a text, what zeroing them does, and how well weights tell large inputs.

    Measurements of the task features/<text> are

        features, features_one_sided            counts, among n hidden dimensions
        layers_affected, positions_affected     shares of the dimension that is large at the most positions, whether or
                                                not it is a feature
        largest_activation                      the largest magnitude of all
        magnitude_q1, _median, _q3              quartiles of the features' values
        top1_probability, cross_entropy_without_features, ...    see measure_ablation

    and of the tasks proxy/<relation> spearman_weight_std, the mean over layers (see measure_proxy).

    Raises:
        ValueError: the model's architecture is not known, or its head is not the last thing that it computes.
    """
    if not splits_at_head(model):
        raise ValueError(f"{type(model).__name__}: its logits are not the output embedding of its last hidden state")
    seen = observe(model, windows, budget, criteria.magnitude)
    leading = find_features(seen, criteria)
    features = [feature for feature in leading if feature.is_feature]
    task, width = f"features/{windows.name}", int(model.get_output_embeddings().weight.shape[1])
    largest = max(float(seen.inputs[place].magnitude.max()) for place in seen.list_stream())
    values = {
        "features": len(features),
        "features_one_sided": sum(feature.one_sided for feature in features),
        "layers_affected": max(leading, key=lambda f: f.positions).layers,
        "positions_affected": max(feature.positions for feature in leading),
        "largest_activation": largest,
    }
    if features:
        pooled = _find_quartiles(seen, [feature.dimension for feature in features])
        values |= dict(zip(("magnitude_q1", "magnitude_median", "magnitude_q3"), pooled, strict=True))
    measurements = [Measurement(task, name, value, math.nan, math.nan, width) for name, value in values.items()]
    measurements += measure_ablation(model, windows, budget, [feature.dimension for feature in features], task)
    return leading, measurements + measure_proxy(model, seen)


def measure_ablation(
    model: Any, windows: Windows, budget: TokenBudget, dimensions: Sequence[int], task: str
) -> list[Measurement]:
    """Measure top-1 probability and cross entropy as they are, without these dimensions, and without as many others.

    Dimensions are set to zero in the inputs of attention and feed-forward layers. The others are drawn with a fixed
    seed. If no dimensions are given, only top1_probability is measured. If more than half of all are given, there are
    not as many others, so that there is no control: nothing is measured without random dimensions.
    """
    width = int(model.get_output_embeddings().weight.shape[1])
    others = torch.tensor([d for d in range(width) if d not in dimensions])
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[: len(dimensions)]]
    if len(drawn) < len(dimensions):
        drawn = drawn[:0]  # zeroing fewer dimensions would make the features look important by their number alone
    measured = []
    for suffix, removed in [("", []), ("_without_features", list(dimensions)), ("_without_random", drawn.tolist())]:
        if suffix and not removed:
            continue
        with _zeroed(model, removed):
            losses, confidences = _score(model, windows, budget)
        measured.append(measure_mean(task, f"top1_probability{suffix}", confidences))
        measured += [measure_mean(task, f"cross_entropy{suffix}", losses)] if suffix else []
    return measured


def measure_proxy(model: Any, seen: Observations) -> list[Measurement]:
    """Correlate the deviation of each unit's incoming weights with its largest magnitude (k-bit paper, Table 2).

    The relations are

        feed_forward    what is last added to the residual stream before a feed-forward layer reads it, and its inputs
        attention       the values, and the inputs of attention's output
        control         the inner units of the feed-forward layer, after their activation

    The first layer of a model with parallel residuals reads the embedding, not a layer, and is left out.
    """
    from scipy.stats import spearmanr  # not at the top: it takes a second, and other measures need none of it

    sources, layers = find_sources(model), list_decoder_layers(model)
    embedding = sources[f"{layers[0].attention[0]}.weight"]
    by_relation: dict[str, list[float]] = {}
    for (index, place), extremes in seen.inputs.items():
        relation, reader = _name_relation(layers[index], place)
        if relation and sources[f"{reader}.weight"] is not embedding:
            deviation = measure_deviation(model, sources[f"{reader}.weight"]).cpu()
            rho = float(spearmanr(deviation.numpy(), extremes.magnitude.numpy()).statistic)
            by_relation.setdefault(relation, []).append(rho)
    means = [measure_mean(f"proxy/{name}", "spearman_weight_std", values) for name, values in by_relation.items()]
    return [dataclasses.replace(m, low=max(m.low, -1.0), high=min(m.high, 1.0)) for m in means]  # as a rho is


def _name_relation(layer: DecoderLayer, place: str) -> tuple[str, str]:
    """Return the relation of Table 2 that an input belongs to (or an empty string), and the module that reads it."""
    return {
        "attention": ("", layer.attention[0]),
        "feed_forward": ("feed_forward", layer.feed_forward[0]),
        "attention_out": ("attention", layer.attention_out),
        "feed_forward_out": ("control", layer.feed_forward_out),
    }[place]


def _list_inputs(layers: Sequence[DecoderLayer]) -> dict[tuple[int, str], str]:
    """Return the module that reads each input. Of several modules with the same input it is the first."""
    places = ("attention", "attention_out", "feed_forward", "feed_forward_out")
    return {(i, place): _name_relation(layer, place)[1] for i, layer in enumerate(layers) for place in places}


def _describe(seen: Observations, dimension: int, is_feature: bool, layers: float, positions: float) -> Feature:
    assert seen.histogram is not None
    negative, positive = seen.histogram[dimension].view(2, _BINS).sum(1).tolist()
    rows = []
    for layer, place in seen.list_stream():
        extremes = seen.inputs[layer, place]
        high, low = float(extremes.high[dimension]), float(extremes.low[dimension])
        share = int(extremes.large[dimension]) / seen.positions
        rows.append(Layer(layer, place, share, high if high >= -low else low))
    quartiles = _find_quartiles(seen, [dimension]) if negative + positive else ()
    return Feature(dimension, is_feature, layers, positions, not (negative and positive), quartiles, tuple(rows))


def _find_quartiles(seen: Observations, dimensions: Sequence[int]) -> tuple[float, ...]:
    """Return the quartiles of these dimensions' large values. Each quartile is the middle of its bin."""
    assert seen.histogram is not None
    counts = seen.histogram[list(dimensions)].sum(0)
    rising = torch.cat([counts[:_BINS].flip(0), counts[_BINS:]])
    middles = seen.magnitude * _BIN ** (torch.arange(_BINS) + 0.5)
    values = torch.cat([-middles.flip(0), middles])
    reached = rising.cumsum(0).double() / rising.sum()
    return tuple(float(values[int((reached >= q).nonzero()[0])]) for q in (0.25, 0.5, 0.75))


def _score(model: Any, windows: Windows, budget: TokenBudget) -> tuple[list[float], list[float]]:
    """Return each window's mean loss and its mean probability of the most likely token."""
    head = model.get_output_embeddings()

    def run(rows: slice) -> Tensor:
        tokens = windows.tokens[rows].to(model.device)
        hidden, targets = run_trunk(model, tokens).flatten(0, 1), tokens[:, 1:].flatten()
        losses = -score_targets(head, hidden, torch.arange(len(targets), device=model.device), targets)[0]
        normalizer = Normalizer.empty(hidden)
        for _, logits in iterate_logits(head, hidden):
            normalizer.add(logits)
        both = torch.stack([losses.double(), 1 / normalizer.total.double()])  # exp(largest - largest) / total
        return both.view(2, *tokens[:, 1:].shape).mean(-1).cpu()

    with torch.no_grad():
        values = torch.cat([result for _, result in iterate_windows(model, windows, budget, run)], dim=1)
    return values[0].tolist(), values[1].tolist()


@contextlib.contextmanager
def _zeroed(model: Any, dimensions: Sequence[int]) -> Iterator[None]:
    """Set dimensions to zero in the inputs of attention and feed-forward layers."""
    modules = [name for layer in list_decoder_layers(model) for name in (*layer.attention, *layer.feed_forward)]
    index = torch.tensor(list(dimensions), dtype=torch.int64, device=model.device)
    with contextlib.ExitStack() as stack:
        for name in modules if len(index) else ():
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs: (inputs[0].index_fill(-1, index, 0.0), *inputs[1:])
            )
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def _hooks(modules: dict[tuple[int, str], str], model: nn.Module, keep: Any) -> Iterator[None]:
    """Call keep(place, input) whenever one of the modules is called."""
    with contextlib.ExitStack() as stack:
        for place, name in modules.items():
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, place=place: keep(place, inputs[0])
            )
            stack.callback(hook.remove)
        yield
