"""The configuration of an experiment and of a run: plain frozen dataclasses, which are also Hydra's schema.

conf/ holds the values (defaults and groups). This module holds the fields, their types and their checks. The fields of
model, quant, eval and train are in the modules config of kbit.models, kbit.methods, kbit.evaluation and kbit.training.
No configuration opens a file: kbit.experiments.identity reads the files that a configuration names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.checks import check_choice, non_defaults
from kbit.evaluation.config import EvalConfig, FeatureConfig, SpeedConfig
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.training.config import TrainConfig

CLAIMS: Final = ("precision", "setting", "frontier")  # kinds of verdicts (analysis/statistics/stopping)
WAITED_FOR: Final = ("acc", "cross_entropy")


@dataclass(frozen=True)
class Experiment:
    """One point of a study: a model, its training if any, a quantizer, and the measurements to make.

    Attributes:
        model, quant, eval, train: see their classes.
        packed: whether the model is evaluated through packed layers (kbit.checkpoints), quantized while it is loaded.
            Its numbers are the same and so is its key, but for eval.speed, which is about the layers. What is measured
            against the 16-bit model is left out.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    packed: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.steps:
            self._check_training()
            if self.train.is_aware:
                self._check_rounding()
        if self.eval.speed.measure and self.quant.run_time_fields:
            raise ValueError(
                f"quant.{next(iter(self.quant.run_time_fields))} simulates numbers, and not their speed: "
                "eval.speed.measure=true would time the simulation"
            )

    def _check_training(self) -> None:
        if self.model.dtype != "float32":
            raise ValueError(
                f"model.dtype={self.model.dtype} is too coarse to train in: model.dtype=float32, and "
                "train.dtype=bfloat16 for products in 16 bits"
            )
        if self.quant.allocates:
            raise ValueError("a training goes on from one map of bits: give quant.rules of kbit.allocate_bits")
        if self.packed and not self.train.lora.rank:
            raise ValueError(
                "packed=true computes with packed layers, which are not trained: packed=false, or train=qlora, which "
                "trains adapters beside them"
            )
        if self.packed and self.train.quantizes_products:
            raise ValueError(
                "packed=true computes with packed layers, whose products are not quantized: packed=false, or "
                "train.activations.bits=16, train.gradients.bits=16 and train.fast.adapt=false"
            )
        if self.train.lora.rank and self.quant.scheme is not None and not self.quant.is_baseline:
            raise ValueError(f"quant.method={self.quant.method} multiplies in int8, which no gradient goes through")

    def _check_rounding(self) -> None:
        """Raise ValueError if a model would be trained for one quantizer and rounded by another."""
        trained, rounded = self.train.weights, self.quant.spec
        if not self.quant.is_baseline and trained.canonical() != rounded.canonical():
            raise ValueError(
                f"train.weights ({trained.label()}) and quant ({rounded.label()}) differ, so that the model would be "
                "trained for one quantizer and rounded by another: set train.weights alone, which quant follows with "
                "train=qat, or quant.bits=16"
            )
        if self.quant.rules or self.quant.keeps_outliers:
            raise ValueError(
                "train.weights rounds every layer in one way: it goes neither with quant.rules nor with quant.outlier_*"
            )
        if self.quant.rotation_words is not None:
            raise ValueError(
                f"train.weights rounds weights as they are, and quant.rotation={self.quant.rotation} would round in a "
                "rotation, for which the model was not trained: quant.rotation=null"
            )
        if not self.quant.activations.is_baseline:
            raise ValueError(
                f"train=qat rounds weights alone, and quant.activations.bits={self.quant.activations.bits} would round "
                "inputs, for which the model was not trained: quant.activations.bits=16"
            )

    @property
    def packed_as(self) -> QuantConfig | None:
        """The quantizer of packed layers, or None of a model that computes with plain weights."""
        return self.quant if self.packed and not self.quant.is_baseline else None

    @property
    def identity_fields(self) -> dict[str, dict[str, Any]]:
        """The fields that decide the numbers, canonical. Model, tasks and texts have the names that the user gave them.

        The batch size and paths are not among them. See QuantConfig.identity_fields for the quantizer's fields, and
        kbit.experiments.identity for the key.
        """
        limit = self.eval.limit if self.eval.tasks or self.eval.measures else None
        evaluation: dict[str, Any] = {"tasks": sorted(self.eval.tasks), "limit": limit}
        if self.eval.tasks:
            evaluation |= {} if self.eval.num_fewshot is None else {"num_fewshot": self.eval.num_fewshot}
            evaluation |= {"apply_chat_template": True} if self.eval.apply_chat_template else {}
        if self.eval.perplexity is not None:
            evaluation |= {"perplexity": self.eval.perplexity}
            if self.eval.perplexity_kind == "windows":
                evaluation |= {"perplexity_windows": self.eval.perplexity_windows}
            else:
                evaluation |= {"perplexity_kind": self.eval.perplexity_kind}
        if self.eval.features.measure:
            evaluation |= {"features": non_defaults(self.eval.features, FeatureConfig())}
        if self.eval.speed.measure:
            packed = {"packed": True} if self.packed_as else {}
            evaluation |= {"speed": non_defaults(self.eval.speed, SpeedConfig()) | packed}
        if self.eval.measures:
            evaluation |= {"measures": list(self.eval.measures)}
        model = {"name": self.model.name, "dtype": self.model.dtype} | self.model.parts
        fields = {"model": model, "quant": self.quant.identity_fields, "eval": evaluation}
        return fields | ({"train": self.train.identity_fields} if self.train.steps else {})

    @property
    def texts(self) -> list[str]:
        """The texts that the experiment needs: the measured text, and those that its method and training see."""
        return [*filter(None, [self.eval.perplexity]), *self.seen_texts.values()]

    @property
    def seen_texts(self) -> dict[str, str]:
        """The text that the method is calibrated on, and the one that the model is trained on, by their keys."""
        texts = {"quant.calibration.text": self.quant.calibration.text} if self.quant.sees_text else {}
        return texts | ({"train.text": self.train.text} if self.train.steps else {})

    def label(self) -> str:
        """Return a short description for people, such as 'nano-neox-1m nf4 block 64' and what is not default."""
        has_blocks = not self.quant.is_baseline and self.quant.scheme is None
        block = f" block {self.quant.block_size or 'whole'}" if has_blocks else ""
        method = f" {self.quant.method}" if has_blocks and self.quant.method != "rtn" else ""
        others = dict(self.quant.label_details)
        if self.model.dtype != ModelConfig.dtype:
            others["dtype"] = self.model.dtype
        others |= self.model.parts
        for name in ("task_path", "num_fewshot"):
            if (value := getattr(self.eval, name)) is not None:
                others[name] = value
        if self.eval.apply_chat_template:
            others["chat_template"] = True
        more = "".join(f" {name}={value}" for name, value in others.items())
        trained = f" {self.train.label()}" if self.train.steps else ""
        return f"{self.model.name} {self.quant.label()}{block}{method}{more}{trained}"


@dataclass(frozen=True)
class RayConfig:
    """How a multirun uses Ray.

    Attributes:
        address: where Ray runs. local starts Ray on this machine, auto or host:port joins a running cluster.
        num_workers: number of workers, each of which holds one model at a time. None is as many as the CPUs allow.
        cpus_per_worker: CPU threads of each worker.
        gpus_per_worker: GPUs of each worker. With a fraction several workers share a GPU, with several GPUs a worker
            holds a model that is larger than one GPU. None chooses by the memory of the largest model
            (kbit.models.size) with device=cuda, and no GPU otherwise.
        niceness: niceness of the workers, 0..19, at which the system prefers other work. Ray's own default is 15. It
            concerns Ray on this machine. A running cluster has what RAY_worker_niceness was where it was started.
    """

    address: str = "local"
    num_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    niceness: int = 0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"ray.num_workers={self.num_workers} is not >= 1 (null: as many as the CPUs allow)")
        if self.cpus_per_worker < 1:
            raise ValueError(f"ray.cpus_per_worker={self.cpus_per_worker} is not >= 1")
        gpus = self.gpus_per_worker
        if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):  # Ray shares one GPU, not several
            raise ValueError(f"ray.gpus_per_worker={gpus:g} is not >= 0, and whole above 1 (null: by the model's size)")
        if not 0 <= self.niceness <= 19:
            raise ValueError(f"ray.niceness={self.niceness} is not in 0..19")


@dataclass(frozen=True)
class UntilConfig:
    """When a study has measured enough.

    Attributes:
        decided: whether items and windows are measured in rounds (an eighth, a quarter, a half, all), in which only
            those experiments go on of which a verdict is not known yet. See docs/guides/decided.md.
        claims: the verdicts to know: precision (which precision of a data type is best at equal total bits), setting
            (which data type or block size of a precision is), frontier (what is best at each measured size).
        metrics: the metrics to know them by: acc (the mean accuracy of the tasks), cross_entropy (of the text). An
            empty list takes all that are measured. What is not waited for stops after an eighth.
    """

    decided: bool = False
    claims: tuple[str, ...] = ("precision", "setting")
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("claims", CLAIMS), ("metrics", WAITED_FOR)):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # Hydra hands over a list
            for value in getattr(self, name):
                check_choice(f"study.until.{name}", value, allowed)
        if not self.claims:
            raise ValueError("study.until.claims=[] asks for no verdict: name one or several, such as [precision]")


@dataclass(frozen=True)
class StudyConfig:
    """A study: a union of grids. See sweeps/.

    Attributes:
        grids: grids of points. Each grid maps keys (quant.bits) to values: a list, or a string as on Hydra's command
            line (3,4 or range(3,9)). The study has every combination of the first grid, then of the second, and so on.
        exclude: points to leave out. Each entry gives one value or a list for some keys, and a point is left out if it
            has all of the values.
        unite: names of other studies to run as one. A study with this field has neither grids nor exclude.
        until: when the study has measured enough.
    """

    grids: list[dict[str, Any]] = field(default_factory=list)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    unite: list[str] = field(default_factory=list)
    until: UntilConfig = field(default_factory=UntilConfig)


@dataclass(frozen=True)
class RunConfig(Experiment):
    """An experiment and how to run it: the schema of `kbit run`.

    Attributes:
        results: folder or URL of the store.
        device: cpu, cuda or cuda:N.
        ray: settings of Ray for a multirun.
        fail_fast: whether the first failed experiment stops the run.
        retry_failed: whether experiments that are recorded as failed are run again.
        study: what a file of sweeps/ asks of a multirun beyond plain values.
    """

    results: str = "results"
    device: str = "cpu"
    ray: RayConfig = field(default_factory=RayConfig)
    fail_fast: bool = False
    retry_failed: bool = False
    study: StudyConfig = field(default_factory=StudyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is not one of: cpu, cuda, cuda:N")

    @property
    def experiment(self) -> Experiment:
        """The experiment alone."""
        return Experiment(self.model, self.quant, self.eval, self.packed, self.train)
