"""What an experiment is, and the configuration of a run: plain frozen dataclasses, which are also Hydra's schema.

conf/ holds the values (defaults and groups); this module holds the fields, their types and their checks; those of
quant are in kbit.methods.config.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from kbit.checks import non_defaults
from kbit.data.task_files import identify_tasks
from kbit.data.texts import identify_text
from kbit.evaluation.config import EvalConfig, FeatureConfig
from kbit.methods.config import QuantConfig
from kbit.models.catalog import identify_model
from kbit.models.config import ModelConfig


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
            evaluation |= {"features": non_defaults(self.eval.features, FeatureConfig())}
        model = {"name": identify_model(self.model.name), "dtype": self.model.dtype}
        return {"model": model, "quant": self.quant.content, "eval": evaluation}

    @property
    def texts(self) -> list[str]:
        """The texts that it needs: the one that is measured, and the one that its method is calibrated on."""
        calibrates = self.quant.traits.needs_text and not self.quant.is_baseline
        texts = [self.eval.perplexity, self.quant.calibration.text if calibrates else None]
        return [text for text in texts if text is not None]

    def check_texts(self) -> None:
        """Raise ValueError if it would calibrate on the text that it measures."""
        if len(self.texts) == 2 and len({identify_text(text) for text in self.texts}) == 1:
            measured, seen = self.texts
            raise ValueError(f"quant.calibration.text={seen!r} is the text that is measured: {measured!r}")

    @functools.cached_property
    def key(self) -> str:
        """16 hexadecimal digits of the sha256 of the content: the experiment's identity in the store."""
        return _hash_content(self.content)

    def check_content(self) -> dict[str, dict[str, Any]]:
        """Return the content as the files now have it, if the key still is that of it.

        Raises:
            ValueError: a file was changed after the key was computed, which is when a study is planned; or see
                check_texts.
        """
        self.check_texts()
        content = self.content
        if _hash_content(content) != self.key:
            files = [self.model.name, *self.texts, self.eval.task_path]
            raise ValueError(
                f"one of {', '.join(str(file) for file in files if file)} has changed since {self.key} was planned, so "
                "that its result would belong to another key: plan the study again"
            )
        return content

    def label(self) -> str:
        """Return a short description for people, such as 'nano-neox-1m nf4 block 64': what is not a default."""
        has_blocks = not self.quant.is_baseline and self.quant.scheme is None
        block = f" block {self.quant.block_size or 'whole'}" if has_blocks else ""
        method = f" {self.quant.method}" if has_blocks and self.quant.method != "rtn" else ""
        others = dict(self.quant.distinctions)
        if self.model.dtype != ModelConfig.dtype:
            others["dtype"] = self.model.dtype
        if self.eval.task_path is not None:
            others["task_path"] = self.eval.task_path
        more = "".join(f" {name}={value}" for name, value in others.items())
        return f"{self.model.name} {self.quant.label()}{block}{method}{more}"


@dataclass(frozen=True)
class RayConfig:
    """How a multirun uses Ray.

    Attributes:
        address: local starts Ray on this machine; auto or host:port joins a running cluster.
        num_workers: workers, each holding one model at a time; None is as many as the CPUs allow.
        cpus_per_worker: CPU threads of each worker.
        gpus_per_worker: GPUs of each worker; a fraction shares a GPU, several hold a model that is larger than one.
            None: with device=cuda as the memory of the largest model asks for (kbit.models.size), else none.
    """

    address: str = "local"
    num_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"ray.num_workers={self.num_workers} is not >= 1 (null: as many as the CPUs allow)")
        if self.cpus_per_worker < 1:
            raise ValueError(f"ray.cpus_per_worker={self.cpus_per_worker} is not >= 1")
        gpus = self.gpus_per_worker
        if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):  # Ray shares one GPU, not several
            raise ValueError(f"ray.gpus_per_worker={gpus:g} is not >= 0, and whole above 1 (null: by the model's size)")


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
