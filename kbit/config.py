"""What an experiment is, and the configuration of a run: plain frozen dataclasses, which are also Hydra's schema.

conf/ holds the values (defaults and groups); this module holds the fields, their types and their checks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.datatypes import check_choice
from kbit.families import identify_model
from kbit.spec import BASELINE_BITS, QuantSpec
from kbit.taskfiles import identify_tasks
from kbit.textdata import identify_text

NANO_TASKS: Final = ("nano_cloze", "nano_choice", "nano_swap", "nano_endings")
# Both operands of each product in 8 bits, see kbit.methods.llm_int8; the names are those of LLM.int8(), Table 1.
INT8_METHODS: Final = (
    "absmax", "zeropoint", "rowwise", "vectorwise", "zeropoint_vectorwise",
    "rowwise_decomposition", "llm_int8", "zeropoint_llm_int8",
)  # fmt: skip
CALIBRATED: Final = ("awq", "gptq")  # methods that see data
METHODS: Final = ("rtn", "mse", "hqq", *CALIBRATED, *INT8_METHODS)  # see kbit.methods
UNSEEN: Final = ("error", "rtn")
OUTLIER_SELECTIONS: Final = ("proxy", "column", "random")  # see kbit.outliers
DTYPES: Final = ("float32", "bfloat16", "float16")
_PER_OUTPUT: Final = ("vectorwise", "zeropoint_vectorwise", "llm_int8", "zeropoint_llm_int8")  # a scale per output
ZERO_POINT_BITS: Final = 8  # an integer in -127..127
PERPLEXITY_KINDS: Final = ("windows", "rolling")  # see kbit.perplexity


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and the dtype it computes in.

    Attributes:
        name: short name (see `kbit models`), local folder or hub id.
        dtype: float32, bfloat16 or float16; the weights are 16-bit values in each case.
    """

    name: str = "nano-neox-98k"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that a method with data sees. Nothing of it should be in the text that is measured.

    Attributes:
        text: an embedded text, a path, or a text of the hub (wikitext2_train, c4_train); see eval.perplexity.
        samples: windows drawn at random, without overlap.
        length: tokens of a window; None is the model's context, at most 2048 (GPTQ: 128 samples of 2048 tokens).
        seed: of the draw.
        unseen: what becomes of a weight that the text never reaches, such as a rarely chosen expert: error, or rtn.
    """

    text: str = "nano_calibration"
    samples: int = 128
    length: int | None = None
    seed: int = 0
    unseen: str = "error"

    def __post_init__(self) -> None:
        check_choice("quant.calibration.unseen", self.unseen, UNSEEN)
        for name in ("samples", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"quant.calibration.{name}={value} is not >= 1")

    @property
    def content(self) -> dict[str, Any]:
        """What decides the windows, canonical."""
        return _differences(self, CalibrationConfig()) | {"text": identify_text(self.text)}


@dataclass(frozen=True)
class GptqConfig:
    """Options of method=gptq; the defaults are those of the published code.

    Attributes:
        act_order: columns by falling Hessian diagonal instead of in their order.
        static_groups: all block scales from the weights as they were, not as they are when their block's turn comes.
        search_scales: each block's scale by search, as method=mse does, instead of its largest magnitude.
        damping: added to the Hessian's diagonal, in means of it; raised tenfold, and recorded, if that is too little.
    """

    act_order: bool = False
    static_groups: bool = False
    search_scales: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"quant.gptq.damping={self.damping:g} is not a finite number >= 0")


@dataclass(frozen=True)
class QuantConfig(QuantSpec):
    """The quantizer and which tensors it applies to.

    Attributes:
        method: rtn (round to nearest), mse (scales searched for the least squared error), hqq (half-quadratic scales
            and offsets), awq (input channels scaled by their activations), gptq; or one of INT8_METHODS, which decide
            the quantizer: they need bits=8, and of a QuantSpec's other fields none means anything to them.
        calibration: of awq and gptq.
        gptq: of gptq.
        outlier_fraction: share p of each matrix' input dimensions that stay at 16 bits, 0 <= p < 1; 0 is none. Costs
            p (16 - bits) bits per parameter. Rounded to the nearest count, at least one dimension.
        outlier_selection: which dimensions: proxy (the weights before have the largest standard deviation; paper, eq.
            2), column (this matrix' own column has), random (a control).
        outlier_zscore: instead of a fraction: the dimensions whose standard deviation is more than so many standard
            deviations above the matrix' mean one (bitsandbytes: 4).
        activation_threshold: of the methods that decompose (llm_int8 and others): input dimensions in which an
            activation is larger are multiplied at 16 bits (LLM.int8(): 6.0).
        include: regular expression of tensor names to quantize in addition to the block matrices.
        exclude: regular expression of tensor names not to quantize.
        min_coverage: least share of the block matrices' parameters that must be quantized, 0..1.
    """

    method: str = "rtn"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    outlier_fraction: float = 0.0
    outlier_selection: str = "proxy"
    outlier_zscore: float | None = None
    activation_threshold: float = 6.0
    include: str | None = None
    exclude: str | None = None
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quant.method", self.method, METHODS)
        self._check_outliers()
        self._check_method()
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"quant.min_coverage={self.min_coverage:g} is not in 0..1")
        for name, pattern in [("include", self.include), ("exclude", self.exclude)]:
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"quant.{name}={pattern!r} is not a regular expression: {error}") from None

    def _check_outliers(self) -> None:
        check_choice("quant.outlier_selection", self.outlier_selection, OUTLIER_SELECTIONS)
        if not 0 <= self.outlier_fraction < 1:
            raise ValueError(f"quant.outlier_fraction={self.outlier_fraction:g} is not in [0, 1)")
        if self.outlier_zscore is not None:
            if not self.outlier_zscore > 0:
                raise ValueError(f"quant.outlier_zscore={self.outlier_zscore:g} is not > 0 (null: none)")
            if self.outlier_fraction or self.outlier_selection == "random":
                raise ValueError(
                    "quant.outlier_zscore says by itself how many dimensions stay at 16 bits: it goes with neither "
                    "quant.outlier_fraction nor quant.outlier_selection=random"
                )
        if not self.activation_threshold > 0:
            raise ValueError(f"quant.activation_threshold={self.activation_threshold:g} is not > 0")

    def _check_method(self) -> None:
        if self.method in INT8_METHODS and self.bits not in (8, BASELINE_BITS):
            raise ValueError(f"quant.method={self.method} computes in 8 bits: quant.bits={self.bits} is not 8")
        if self.rounding == "stochastic" and self.method in ("mse", "hqq", "gptq"):
            raise ValueError(f"quant.method={self.method} minimises an error, which rounding=stochastic would add to")
        if self.method == "gptq" and self.gptq.act_order and not self.gptq.static_groups and self.block_size:
            raise ValueError(
                "quant.gptq.act_order=true with blocks needs quant.gptq.static_groups=true: blocks of reordered "
                "columns would need an index for each column, which total_bits does not count"
            )

    @staticmethod
    def of(spec: QuantSpec) -> QuantConfig:
        """Return a bare quantizer as what to do with a model; a QuantConfig is returned as it is."""
        if isinstance(spec, QuantConfig):
            return spec
        return QuantConfig(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(QuantSpec)})

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> QuantConfig:
        """Return the configuration again that went through dataclasses.asdict and JSON; see QuantSpec.from_json."""
        known = {f.name: values[f.name] for f in dataclasses.fields(QuantConfig) if f.name in values}
        for name, kind in (("calibration", CalibrationConfig), ("gptq", GptqConfig)):
            if name in known:
                known[name] = kind(**known[name])
        return QuantConfig(**known)

    @property
    def keeps_outliers(self) -> bool:
        """Whether input dimensions stay at 16 bits that are chosen before anything runs."""
        return not self.is_baseline and bool(self.outlier_fraction or self.outlier_zscore)

    @property
    def decomposes(self) -> bool:
        """Whether input dimensions are multiplied at 16 bits that are found at run time."""
        return self.method in INT8_METHODS and self.method.endswith(("llm_int8", "decomposition"))

    @property
    def sees_whole_input(self) -> bool:
        """Whether an output depends on more of a layer's input than its own token: on what else is in the batch."""
        return not self.is_baseline and (self.method in ("absmax", "zeropoint") or self.decomposes)

    @property
    def spec(self) -> QuantSpec:
        """The weights' quantizer alone."""
        if self.method in INT8_METHODS and not self.is_baseline:
            layout = "row" if self.method in _PER_OUTPUT else "flat"
            return QuantSpec(bits=8, data_type="int", block_size=None, layout=layout, scale_format="fp32")
        return QuantSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QuantSpec)})

    @property
    def content(self) -> dict[str, Any]:
        """What decides the quantized model, canonical: without fields that mean nothing here or are at their default.

        So a field added later does not change the keys of old results; in turn a default, once released, never changes.
        """
        spec = self.spec.canonical()
        content = _differences(spec, QuantSpec()) | {"bits": spec.bits}
        if spec.is_baseline:
            return content
        names = {name: getattr(self, name) for name in ("include", "exclude") if getattr(self, name)}
        return content | {"method": self.method} | self.method_options | names | self._outlier_content()

    @property
    def method_options(self) -> dict[str, Any]:
        """The options that mean something to the method, canonical; empty for a method without any."""
        options: dict[str, Any] = {"calibration": self.calibration.content} if self.method in CALIBRATED else {}
        if self.method == "gptq" and (own := _differences(self.gptq, GptqConfig())):
            options["gptq"] = own
        return options

    def _outlier_content(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if self.keeps_outliers:
            names = ("outlier_fraction", "outlier_zscore")
            content |= {name: getattr(self, name) for name in names if getattr(self, name)}
            content |= {"outlier_selection": self.outlier_selection} if self.outlier_selection != "proxy" else {}
            content |= {"seed": self.seed} if self.outlier_selection == "random" and self.seed else {}
        if self.decomposes and self.activation_threshold != QuantConfig.activation_threshold:
            content |= {"activation_threshold": self.activation_threshold}
        return content

    def count_bits(self, shape: Sequence[int], kept: int | None = None) -> int:
        """Return the bits of a matrix [..., out, in] of this shape, its input dimensions at 16 bits included.

        Codes, scales, zero points of int8 methods and AWQ's scale of each input too. A kept dimension costs 16 - bits
        for each of its weights: it has its share in the blocks' scales as if it were quantized, and the paper's
        p (16 - bits) does not count the indices of the dimensions (16 / out bits for each kept weight). What is
        decomposed at run time is not counted.

        Args:
            shape: of the matrix, input dimensions last.
            kept: how many input dimensions are kept; None is as many as outlier_fraction says (of outlier_zscore, which
                only the weights' values tell, none).
        """
        spec, elements = self.spec, math.prod(shape)
        if spec.is_baseline or elements == 0:
            return spec.count_bits(shape)
        kept = self.count_kept(shape[-1]) if kept is None else kept
        zero_points = ZERO_POINT_BITS * spec.count_blocks(shape) if self.method.startswith("zeropoint") else 0
        input_scales = BASELINE_BITS * math.prod(shape[:-2]) * shape[-1] if self.method == "awq" else 0
        kept_bits = elements // shape[-1] * kept * (BASELINE_BITS - self.bits)
        return spec.count_bits(shape) + zero_points + input_scales + kept_bits

    def count_kept(self, inputs: int) -> int:
        """Return how many of so many input dimensions outlier_fraction keeps at 16 bits."""
        return max(1, math.floor(self.outlier_fraction * inputs + 0.5)) if self.outlier_fraction else 0

    def label(self) -> str:
        """Return the short name of a bare quantizer, or the int8 method's, and what of outliers is kept."""
        name = self.method if self.method in INT8_METHODS and not self.is_baseline else super().label()
        if not self.keeps_outliers:
            return name
        share = f"{self.outlier_fraction:.3g}" if self.outlier_fraction else f"z > {self.outlier_zscore:g}"
        return f"{name} {self.outlier_selection} outliers {share}"


@dataclass(frozen=True)
class FeatureConfig:
    """Emergent outlier features (kbit.features), by the criteria of LLM.int8().

    Attributes:
        measure: whether they are looked for, on the windows of eval.perplexity.
        magnitude: from which on a hidden value is large.
        layers: least share of layers in which a feature is large, 0..1.
        positions: least share of positions at which it is, 0..1.
    """

    measure: bool = False
    magnitude: float = 6.0
    layers: float = 0.25
    positions: float = 0.06

    def __post_init__(self) -> None:
        if not self.magnitude > 0:
            raise ValueError(f"eval.features.magnitude={self.magnitude:g} is not > 0")
        for name in ("layers", "positions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"eval.features.{name}={getattr(self, name):g} is not in 0..1")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
        tasks: lm-eval task names, zero-shot.
        limit: only the first items of each task; None is all.
        batch_size: of a forward pass, as a budget: sequences of 32 tokens on a CPU (32: 1,024 tokens), of 512 on a
            GPU. What is measured does not depend on it beyond float rounding (log-likelihoods to 1e-4 in float32), so
            it is no part of the key.
        perplexity: a text to measure cross entropy on: embedded name, path, or hub text (wikitext2, c4, pile_cc); None
            is none.
        perplexity_kind: windows (fixed, per token: the papers' definition) or rolling (lm-eval's, per word).
        perplexity_windows: at most this many windows of the model's context (at most 2048 tokens); None is all. Rolling
            perplexity is always of the whole text.
        task_path: a folder with the user's own task YAMLs.
        features: whether and how emergent outlier features are looked for.
    """

    tasks: tuple[str, ...] = NANO_TASKS
    limit: int | None = None
    batch_size: int = 32
    perplexity: str | None = "nano_held_out"
    perplexity_kind: str = "windows"
    perplexity_windows: int | None = 256
    task_path: str | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))  # Hydra hands over a list
        for name in ("limit", "batch_size", "perplexity_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{name}={value} is not >= 1")
        check_choice("eval.perplexity_kind", self.perplexity_kind, PERPLEXITY_KINDS)
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)} names a task twice")
        if not self.tasks and self.perplexity is None:
            raise ValueError("nothing to measure: eval.tasks is empty and eval.perplexity is null")
        if self.features.measure and (self.perplexity is None or self.perplexity_kind != "windows"):
            raise ValueError("eval.features.measure needs a text: eval.perplexity, with eval.perplexity_kind=windows")


@dataclass(frozen=True)
class Experiment:
    """One point of a study: a model, a quantizer, and what is measured."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def content(self) -> dict[str, dict[str, Any]]:
        """The scientific content, canonical: what decides the numbers, and nothing else.

        Batch size and paths are not in it; see QuantConfig.content for the quantizer.
        """
        limit = self.eval.limit if self.eval.tasks else None
        tasks = identify_tasks(self.eval.tasks, self.eval.task_path)
        evaluation: dict[str, Any] = {"tasks": tasks, "limit": limit}
        if self.eval.perplexity is not None:
            evaluation |= {"perplexity": identify_text(self.eval.perplexity)}
            if self.eval.perplexity_kind == "windows":
                evaluation |= {"perplexity_windows": self.eval.perplexity_windows}
            else:
                evaluation |= {"perplexity_kind": self.eval.perplexity_kind}
        if self.eval.features.measure:
            evaluation |= {"features": _differences(self.eval.features, FeatureConfig())}
        model = {"name": identify_model(self.model.name), "dtype": self.model.dtype}
        return {"model": model, "quant": self.quant.content, "eval": evaluation}

    @property
    def texts(self) -> list[str]:
        """The texts that it needs.

        Raises:
            ValueError: it would calibrate on the text that it measures.
        """
        measured = self.eval.perplexity
        seen = self.quant.calibration.text if self.quant.method in CALIBRATED and not self.quant.is_baseline else None
        if seen is not None and measured is not None and identify_text(seen) == identify_text(measured):
            raise ValueError(f"quant.calibration.text={seen!r} is the text that is measured: {measured!r}")
        return [text for text in (measured, seen) if text is not None]

    @functools.cached_property
    def key(self) -> str:
        """16 hexadecimal digits of the sha256 of the content: the experiment's identity in the store."""
        return _hash_content(self.content)

    def check_content(self) -> dict[str, dict[str, Any]]:
        """Return the content as the files now have it, if the key still is that of it.

        Raises:
            ValueError: a file was changed after the key was computed, which is when a study is planned.
        """
        content = self.content
        if _hash_content(content) != self.key:
            files = [self.model.name, self.eval.perplexity, self.eval.task_path]
            raise ValueError(
                f"one of {', '.join(str(file) for file in files if file)} has changed since {self.key} was planned, so "
                "that its result would belong to another key: plan the study again"
            )
        return content

    def label(self) -> str:
        """Return a short description for people, such as 'nano-neox-1m nf4 block 64'."""
        has_blocks = not self.quant.is_baseline and self.quant.method not in INT8_METHODS
        block = f" block {self.quant.block_size or 'whole'}" if has_blocks else ""
        method = f" {self.quant.method}" if has_blocks and self.quant.method != "rtn" else ""
        return f"{self.model.name} {self.quant.label()}{block}{method}"


@dataclass(frozen=True)
class RayConfig:
    """How a multirun uses Ray.

    Attributes:
        address: local starts Ray on this machine; auto or host:port joins a running cluster.
        num_workers: workers, each holding one model at a time; None is as many as the CPUs allow.
        cpus_per_worker: CPU threads of each worker.
        gpus_per_worker: GPUs of each worker; a fraction shares a GPU.
    """

    address: str = "local"
    num_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"ray.num_workers={self.num_workers} is not >= 1 (null: as many as the CPUs allow)")
        if self.cpus_per_worker < 1:
            raise ValueError(f"ray.cpus_per_worker={self.cpus_per_worker} is not >= 1")
        if not self.gpus_per_worker >= 0:  # so that NaN is refused, too
            raise ValueError(f"ray.gpus_per_worker={self.gpus_per_worker:g} is not >= 0")


@dataclass(frozen=True)
class StudyConfig:
    """A study: a union of grids. See sweeps/.

    Attributes:
        grids: each maps keys (quant.bits) to values: a list, or a string as on Hydra's command line (3,4 or
            range(3,9)). The study is every combination of the first, then of the second, ...
        exclude: points to leave out, those that have all of the given values (one value or a list for each key).
        unite: names of other studies, to run as one; a study with it has nothing else.
    """

    grids: list[dict[str, Any]] = field(default_factory=list)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    unite: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig(Experiment):
    """An experiment and how to run it: the schema of `kbit run`.

    Attributes:
        results: folder of the store.
        device: cpu, cuda or cuda:N.
        ray: of a multirun.
        fail_fast: stop at the first failed experiment.
        retry_failed: run experiments again that are recorded as failed.
        study: of a multirun; what a file of sweeps/ asks for beyond plain values.
    """

    results: str = "results"
    device: str = "cpu"
    ray: RayConfig = field(default_factory=RayConfig)
    fail_fast: bool = False
    retry_failed: bool = False
    study: StudyConfig = field(default_factory=StudyConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is not one of: cpu, cuda, cuda:N")

    @property
    def experiment(self) -> Experiment:
        """The experiment alone."""
        return Experiment(self.model, self.quant, self.eval)


def _hash_content(content: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _differences(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their default."""
    mine, theirs = dataclasses.asdict(value), dataclasses.asdict(default)
    return {name: mine[name] for name in mine if mine[name] != theirs[name]}
