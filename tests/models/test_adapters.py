"""Adapters merged into weights, against W + scale B A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model

RANK, ALPHA = 2, 8.0
TARGETS = {"nano-neox-98k": "gpt_neox.layers.1.mlp.dense_4h_to_h", "nano-gpt2-98k": "transformer.h.0.mlp.c_fc"}


def write_adapter(folder: Path, name: str, seed: int = 0, **config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a LoRA adapter of one linear layer of a nano model, and return its A [rank, in] and B [out, rank]."""
    weight = load_model(name).model.get_parameter(f"{TARGETS[name]}.weight")
    rows, columns = weight.shape[::-1] if "gpt2" in name else weight.shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator) / 10
    folder.mkdir()
    prefix = f"base_model.model.{TARGETS[name]}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    about |= {"target_modules": [TARGETS[name].rpartition(".")[2]], "layers_to_transform": [1 if "neox" in name else 0]}
    about |= {"fan_in_fan_out": "gpt2" in name, "base_model_name_or_path": name}
    (folder / "adapter_config.json").write_text(json.dumps(about | config))
    return a, b


@pytest.mark.parametrize(
    ("name", "config", "scale"),
    [
        ("nano-neox-98k", {}, ALPHA / RANK),
        ("nano-gpt2-98k", {}, ALPHA / RANK),
        ("nano-neox-98k", {"use_rslora": True}, ALPHA / RANK**0.5),
    ],
)
def test_an_adapter_is_added_to_its_weight_and_to_no_other(
    tmp_path: Path, name: str, config: dict[str, Any], scale: float
) -> None:
    a, b = write_adapter(tmp_path / "lora", name, **config)
    plain, merged = load_model(name).model, load_model(name, adapter=str(tmp_path / "lora")).model
    change = scale * b @ a
    assert type(merged) is type(plain)
    assert [key for key, _ in merged.named_parameters()] == [key for key, _ in plain.named_parameters()]
    for key, value in plain.named_parameters():
        expected = value.detach()
        if key == f"{TARGETS[name]}.weight":
            expected = (value + (change.T if "gpt2" in name else change)).half().float()
            assert not torch.equal(expected, value)
        # float32 sums in another order may round to the neighbour in float16
        torch.testing.assert_close(merged.get_parameter(key), expected, rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_to_transform": [0]}, r"does not fit the model: \d tensors, such as .*lora_"),
        ({"target_modules": ["q_proj"]}, "does not fit the model"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path / "lora", "nano-neox-98k", **config)
    with pytest.raises(ValueError, match=message):
        load_model("nano-neox-98k", adapter=str(tmp_path / "lora"))


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.adapter='lora' is neither a folder here nor a hub id"):
        load_model("nano-neox-98k", adapter="lora")
    with pytest.raises(FileNotFoundError, match=rf"model\.adapter: no file at {tmp_path}/adapter"):
        load_model("nano-neox-98k", adapter=str(tmp_path))


def test_parts_of_a_checkpoint_are_in_the_key_by_their_content(tmp_path: Path) -> None:
    def key(**fields: Any) -> str:
        return find_key(Experiment(ModelConfig(**fields)))

    for number, folder in enumerate(("one", "two", "three")):
        write_adapter(tmp_path / folder, "nano-neox-98k", seed=number % 2)
    one, two, three = (key(adapter=str(tmp_path / folder)) for folder in ("one", "two", "three"))
    assert len({key(), one, two, key(revision="main", name="org/name"), key(tokenizer="nano-opt-98k")}) == 5
    (tmp_path / "one").rename(tmp_path / "same")
    (tmp_path / "three").rename(tmp_path / "deep")
    assert key(adapter=str(tmp_path / "same")) != one  # a folder's name is part of its identity, as with models
    assert three != two
    assert key(family="mine", size="1b") == key()  # they decide no number
