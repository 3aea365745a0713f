"""kbit as a model of lm-eval's own command line: quantize, then score with kbit's scorer.

lm-eval finds models in a registry that it fills itself, without entry points, so that kbit has to be imported first:

    python -m kbit.lmeval run --model kbit --model_args pretrained=nano-neox-98k,bits=4,data_type=nf --tasks nano_cloze

is `lm_eval` with the model `kbit` known, and kbit's nano tasks, whose data ships with it. Every other name (piqa, too)
is lm-eval's own task, on data of the hub. In Python: `import kbit.lmeval`, then
`lm_eval.simple_evaluate(model="kbit", ...)`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Final

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.tasks._index import Entry, Kind, TaskIndex  # private, but lm-eval registers no tasks otherwise
from lm_eval.tasks._yaml_loader import load_yaml

from kbit.budget import TokenBudget
from kbit.config import NANO_TASKS, TOKENS_PER_SEQUENCE, EvalConfig
from kbit.methods import quantize_model
from kbit.models import load_model
from kbit.quantconfig import QuantConfig
from kbit.scorer import Scorer
from kbit.spec import QuantSpec
from kbit.taskfiles import EMBEDDED_TASKS
from kbit.tasks import JsonFiles, complete_definition

log = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE: Final = EvalConfig().batch_size


@register_model("kbit")
class QuantizedLM(Scorer):
    """A model by short name, hub id or folder, quantized, for lm-eval.

    Attributes:
        report: what was quantized, and its bits.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        min_coverage: float = QuantConfig.min_coverage,
        **quantizer: Any,
    ) -> None:
        """Load and quantize.

        Args:
            pretrained: as `model.name` of `kbit run`.
            dtype: that the model computes in.
            device: as lm-eval has it: cuda:0 is what its command line asks for by default.
            batch_size: of generation; log-likelihoods are computed with at least EvalConfig's default.
            max_batch_size: of lm-eval's own search for a batch size, which kbit does not need.
            include, exclude, min_coverage: see QuantConfig.
            quantizer: fields of QuantSpec; block_size=none is the whole tensor.

        Raises:
            ValueError: a key that is no field of QuantSpec, or see QuantSpec, load_model, quantize_model.
        """
        fields = [field.name for field in dataclasses.fields(QuantSpec)]
        if unknown := sorted(quantizer.keys() - set(fields)):
            raise ValueError(f"--model_args: no key {unknown[0]!r}; of the quantizer there are {', '.join(fields)}")
        nulls = ("none", "null")
        values: dict[str, Any] = {k: None if str(v).lower() in nulls else v for k, v in quantizer.items()}
        loaded = load_model(pretrained, dtype=dtype, device=_choose_device(device))
        config = QuantConfig(**values, include=include, exclude=exclude, min_coverage=min_coverage)
        self.report = quantize_model(loaded.model, config, loaded.tokenizer)
        asked = int(str(batch_size)) if str(batch_size).isdigit() else DEFAULT_BATCH_SIZE
        super().__init__(loaded.model, loaded.tokenizer, asked)
        # lm-eval's command line says 1 unless told otherwise, which is for loops that pad; it changes no score
        self.budget = TokenBudget(max(asked, DEFAULT_BATCH_SIZE) * TOKENS_PER_SEQUENCE[self.device.type])

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's description of the model, and the quantizer with its bits."""
        counts = {name: getattr(self.report, name) for name in ("total_bits", "bits_per_param", "coverage")}
        info: dict[str, Any] = super().get_model_info()
        return info | {"kbit": dataclasses.asdict(self.report.spec) | counts | {"scorer": self.path}}


def register_tasks() -> None:
    """Let every index of tasks that lm-eval makes from now on have kbit's nano tasks; a task of their name wins."""
    build = TaskIndex.build

    def build_with_nano_tasks(*arguments: Any, **options: Any) -> dict[str, Entry]:
        index: dict[str, Entry] = build(*arguments, **options)
        for name in NANO_TASKS:
            index.setdefault(name, Entry(name, Kind.TASK, yaml_path=None, cfg=_define_task(name)))
        return index

    TaskIndex.build = staticmethod(build_with_nano_tasks)


def _define_task(name: str) -> dict[str, Any]:
    """Return a shipped task's definition, which reads its data wherever lm-eval runs, and without its data cache."""
    return complete_definition(load_yaml(EMBEDDED_TASKS / f"{name}.yaml"), JsonFiles(EMBEDDED_TASKS))


def _choose_device(device: str | None) -> str:
    """Return the device; the CPU, with a warning, where lm-eval's default of a first GPU is not there."""
    if device == "cuda:0" and not torch.cuda.is_available():
        log.warning("no CUDA device here: the model runs on the CPU")
        return "cpu"
    return device or "cpu"


register_tasks()

if __name__ == "__main__":
    cli_evaluate()
