"""kbit as a model of lm-eval's own command line: the model is quantized, then scored with kbit's scorer.

lm-eval finds models in a registry that it fills itself, without entry points. So kbit has to be imported first:

    python -m kbit.lmeval run --model kbit --model_args pretrained=nano-neox-98k,bits=4,data_type=nf --tasks nano_cloze

is `lm_eval` with the model `kbit` and kbit's nano tasks, whose data ships with kbit. Every other name (piqa, too) is
lm-eval's own task, on data of the hub. In Python: `import kbit.lmeval`, then
`lm_eval.simple_evaluate(model="kbit", ...)`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from kbit.checkpoints.loading import load_model
from kbit.checkpoints.packing import compute_exactly, find_packed_report
from kbit.data.lm_eval_private import add_tasks, hide_progress, read_definition
from kbit.data.task_files import EMBEDDED_TASKS
from kbit.data.tasks import complete_definition, find_data
from kbit.evaluation.config import NANO_TASKS, TOKENS_PER_SEQUENCE, EvalConfig
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.token_budget import TokenBudget
from kbit.methods.config import OPTION_GROUPS, QuantConfig
from kbit.methods.quantize_model import quantize_model

log = logging.getLogger(__name__)
DEFAULT_BATCH_SIZE: Final = EvalConfig().batch_size


@register_model("kbit")
class QuantizedLM(Scorer):
    """A quantized model for lm-eval, given by short name, hub id or folder.

    Attributes:
        quant: quantizer, method and options.
        report: the quantized tensors, and their bits.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **quant: Any,
    ) -> None:
        """Load the model and quantize it.

        Args:
            pretrained: model as in `model.name` of `kbit run`. One that `kbit pack` made is evaluated as it is.
            dtype: dtype that the model computes in.
            device: device as lm-eval names it. Its command line asks for cuda:0 by default.
            batch_size: sequences at once in generation. Log-likelihoods take at least EvalConfig's default.
            max_batch_size: limit of lm-eval's own search for a batch size, which kbit does not need.
            quant: keys as in `quant.` of `kbit run`: bits=3, method=gptq, calibration.samples=32. None or null is no
                value (with block_size=null a block is the whole tensor).

        Raises:
            ValueError: a key is no field of QuantConfig, or see QuantConfig, load_model and quantize_model.
        """
        hide_progress()
        self.quant = read_options(quant)
        loaded = load_model(pretrained, dtype=dtype, device=_choose_device(device))
        packed = find_packed_report(loaded.model)
        if packed is not None and quant and not self.quant.is_unchanged:
            raise ValueError(
                f"pretrained={pretrained} is packed by kbit already, and is not quantized again: leave out "
                f"{', '.join(quant)}, or give bits=16"
            )
        if packed is None:
            self.report = quantize_model(loaded.model, self.quant, loaded.tokenizer)
        else:
            self.quant, self.report = loaded.model.config.quantization_config.quant, packed
            compute_exactly(loaded.model)
        asked = int(str(batch_size)) if str(batch_size).isdigit() else DEFAULT_BATCH_SIZE
        super().__init__(loaded.model, loaded.tokenizer, asked)
        # lm-eval's command line says 1 unless told otherwise. That is for loops that pad, and changes no score
        self.budget = TokenBudget(max(asked, DEFAULT_BATCH_SIZE) * TOKENS_PER_SEQUENCE[self.device.type])

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's description of the model, with the quantizer and its bits."""
        counts = {name: getattr(self.report, name) for name in ("total_bits", "bits_per_param", "coverage")}
        info: dict[str, Any] = super().get_model_info()
        return info | {"kbit": dataclasses.asdict(self.quant) | counts | {"scorer": self.path}}


def read_options(options: Mapping[str, Any]) -> QuantConfig:
    """Return a QuantConfig from its fields by name. A field of a group has the group's name too: calibration.samples.

    Raises:
        ValueError: a name is no field, or see QuantConfig.
    """
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {name: {} for name in OPTION_GROUPS}
    for key, given in options.items():
        value = None if str(given).lower() in ("none", "null") else given
        group, _, name = key.rpartition(".")
        if key not in _list_options():
            raise ValueError(f"--model_args: no key {key!r}; of the quantizer there are {', '.join(_list_options())}")
        (groups[group] if group else values)[name] = value
    return QuantConfig(**values, **{name: OPTION_GROUPS[name](**own) for name, own in groups.items()})


def _list_options() -> list[str]:
    own = [field.name for field in dataclasses.fields(QuantConfig) if field.name not in OPTION_GROUPS]
    return own + [
        f"{group}.{field.name}" for group, kind in OPTION_GROUPS.items() for field in dataclasses.fields(kind)
    ]


def register_tasks() -> None:
    """Add kbit's nano tasks to every index of tasks that lm-eval makes from now on. A task of the same name wins."""
    add_tasks(lambda: {name: _define_task(name) for name in NANO_TASKS})


def _define_task(name: str) -> dict[str, Any]:
    """Return a shipped task's definition. It reads its data wherever lm-eval runs, without lm-eval's data cache."""
    definition = read_definition(EMBEDDED_TASKS / f"{name}.yaml")[0]
    return complete_definition(definition, find_data(definition, EMBEDDED_TASKS))


def _choose_device(device: str | None) -> str:
    """Return the device. lm-eval's default of a first GPU becomes the CPU, with a warning, where there is no GPU."""
    if device == "cuda:0" and not torch.cuda.is_available():
        log.warning("no CUDA device here: the model runs on the CPU")
        return "cpu"
    return device or "cpu"


register_tasks()


if __name__ == "__main__":
    cli_evaluate()
