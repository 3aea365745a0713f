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
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.datatypes import check_choice
from kbit.families import identify_model
from kbit.spec import QuantSpec
from kbit.taskfiles import identify_tasks
from kbit.textdata import identify_text

NANO_TASKS: Final = ("nano_cloze", "nano_choice", "nano_swap", "nano_endings")
METHODS: Final = ("rtn", "mse", "hqq", "awq", "gptq")  # see kbit.methods, one module each
CALIBRATED: Final = ("awq", "gptq")  # methods that see data
UNSEEN: Final = ("error", "rtn")
DTYPES: Final = ("float32", "bfloat16", "float16")
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
            and offsets), awq (input channels scaled by their activations), gptq.
        calibration: of awq and gptq.
        gptq: of gptq.
        include: regular expression of tensor names to quantize in addition to the block matrices.
        exclude: regular expression of tensor names not to quantize.
        min_coverage: least share of the block matrices' parameters that must be quantized, 0..1.
    """

    method: str = "rtn"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    include: str | None = None
    exclude: str | None = None
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quant.method", self.method, METHODS)
        self._check_method()
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"quant.min_coverage={self.min_coverage:g} is not in 0..1")
        for name, pattern in [("include", self.include), ("exclude", self.exclude)]:
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"quant.{name}={pattern!r} is not a regular expression: {error}") from None

    def _check_method(self) -> None:
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

    @property
    def spec(self) -> QuantSpec:
        """The quantizer alone."""
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
        return content | {"method": self.method} | self.method_options | names

    @property
    def method_options(self) -> dict[str, Any]:
        """The options that mean something to the method, canonical; empty for a method without any."""
        options: dict[str, Any] = {"calibration": self.calibration.content} if self.method in CALIBRATED else {}
        if self.method == "gptq" and (own := _differences(self.gptq, GptqConfig())):
            options["gptq"] = own
        return options


@dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
        tasks: lm-eval task names, zero-shot.
        limit: only the first items of each task; None is all.
        batch_size: of a forward pass, as a budget: sequences of 32 tokens on a CPU (32: 1,024 tokens), of 512 on a
            GPU; no effect on what is measured.
        perplexity: a text to measure cross entropy on: embedded name, path, or hub text (wikitext2, c4, pile_cc); None
            is none.
        perplexity_kind: windows (fixed, per token: the papers' definition) or rolling (lm-eval's, per word).
        perplexity_windows: at most this many windows of the model's context (at most 2048 tokens); None is all. Rolling
            perplexity is always of the whole text.
        task_path: a folder with the user's own task YAMLs.
    """

    tasks: tuple[str, ...] = NANO_TASKS
    limit: int | None = None
    batch_size: int = 32
    perplexity: str | None = "nano_held_out"
    perplexity_kind: str = "windows"
    perplexity_windows: int | None = 256
    task_path: str | None = None

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
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def label(self) -> str:
        """Return a short description for people, such as 'nano-neox-1m nf4 block 64'."""
        block = "" if self.quant.is_baseline else f" block {self.quant.block_size or 'whole'}"
        method = "" if self.quant.is_baseline or self.quant.method == "rtn" else f" {self.quant.method}"
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


def _differences(value: Any, default: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their default."""
    mine, theirs = dataclasses.asdict(value), dataclasses.asdict(default)
    return {name: mine[name] for name in mine if mine[name] != theirs[name]}
