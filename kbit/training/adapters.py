"""LoRA adapters by peft: put beside a model's linear layers, saved, and taken out again.

A model is quantized, and its bits are counted, before adapters are put in. Afterwards a layer's weight has another name
(base_layer.weight), and each adapter looks like two more matrices of the block.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kbit.layers.quantized_linear import QuantizedLinear
from kbit.models.parameters import find_towers, why_outside
from kbit.training.sections import LoraConfig


def list_targets(model: nn.Module, targets: str | None) -> list[str]:
    """Return the names of the linear layers, plain or packed, that get an adapter.

    Args:
        model: the model.
        targets: regular expression that a name must match anywhere. None takes every linear layer of the blocks.

    Raises:
        ValueError: no layer matches. The message names the layers that there are.
    """
    towers = find_towers(model)
    kinds = nn.Linear | Conv1D | QuantizedLinear
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    inside = [name for name in linear if not why_outside(name, towers)]
    found = [name for name in inside if targets is None or re.search(targets, name)]
    if not found:
        there = ", ".join(sorted({re.sub(r".*\.\d+\.", "", name) for name in inside})) or "none"
        raise ValueError(f"train.lora.targets={targets!r} matches no linear layer of the blocks, which are: {there}")
    return found


@contextmanager
def adapters_in(model: nn.Module, config: LoraConfig, seed: int) -> Iterator[None]:
    """Put untrained adapters into a model within the block, and freeze everything else. The class stays as it is.

    An untrained adapter adds exactly 0. At the end the model has the layers that it had, of which nothing changed.

    Raises:
        ValueError: see list_targets.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    from kbit.layers.peft_private import adapt_packed_layers  # imports peft

    names = list_targets(model, config.targets)
    transposed = isinstance(model.get_submodule(names[0]), Conv1D)
    asked = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names, fan_in_fan_out=transposed)  # type: ignore[arg-type]  # alpha need not be whole
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(adapt_packed_layers(asked), model)
        yield
    finally:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, module in layers:
            model.set_submodule(name, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)


def save_adapters(model: Any, folder: Path) -> None:
    """Write a model's adapters as peft does, for `model.adapter=FOLDER` or for peft itself.

    They were trained beside the quantized base. kbit merges an adapter into the 16-bit base before it quantizes, which
    makes another model than the one that was measured.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # so that the folder is there as a whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = get_peft_model_state_dict(model).items()
    named = {f"base_model.model.{name}": value.contiguous() for name, value in weights}  # as peft has it
    save_file(named, part / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.replace(folder)
