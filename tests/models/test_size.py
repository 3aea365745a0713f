"""The size of a model, known without reading its weights, and the memory that follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kbit.engine.estimate import estimate_memory
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.models.catalog import EMBEDDED, STUDIED
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model
from kbit.models.parameters import distinct_parameters
from kbit.models.size import ModelSize, find_size


@pytest.mark.parametrize(
    "name", ["nano-neox-98k", "nano-gpt2-98k", "nano-opt-98k", "nano-bloom-98k", "nano-stories-260k"]
)
def test_an_embedded_models_size_is_that_of_the_loaded_one(name: str) -> None:
    model: Any = load_model(name).model
    size = find_size(name)
    assert size == ModelSize(
        parameters=sum(parameter.numel() for _, parameter in distinct_parameters(model)),
        hidden=model.get_input_embeddings().weight.shape[1],
        context=getattr(model.config, "max_position_embeddings", 0) or model.config.seq_length,  # BLOOM's
        vocabulary=model.config.vocab_size,
        embedded=sum(p.numel() for _, p in distinct_parameters(model) if len(p) == model.config.vocab_size),
        largest=max(parameter.numel() for parameter in model.parameters()),
        inner=getattr(model.config, "intermediate_size", None) or getattr(model.config, "ffn_dim", None),
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-125m", 125e6), ("pythia-1.4b-v0", 1.4e9), ("bloom-7b1", 7.1e9), ("bloom-560m", 560e6),
        ("gpt-neox-20b", 20e9), ("bloom", 176e9), ("gpt2-xl", 1.558e9), ("EleutherAI/pythia-12b", 12e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9), ("Qwen/Qwen2.5-0.5B", 0.5e9), ("nobody/knows", None), ("typo", None),
    ],
)  # fmt: skip
def test_a_model_that_is_not_here_has_the_size_in_its_name(name: str, parameters: float | None) -> None:
    size = find_size(name)
    assert (size.parameters if size else None) == parameters


def test_every_studied_model_has_a_size_and_families_are_in_order() -> None:
    by_family: dict[str, list[int]] = {}
    for model in STUDIED.values():
        size = find_size(model.name)
        assert size is not None
        by_family.setdefault(model.family, []).append(size.parameters)
    assert [sizes for sizes in by_family.values() if sizes != sorted(sizes)] == []


@pytest.mark.parametrize(("parameters", "hidden"), [(1.3e9, 2048), (6.7e9, 4096), (66e9, 9216), (176e9, 14336)])
def test_the_guessed_hidden_size_is_near_the_true_one(parameters: float, hidden: int) -> None:
    """OPT 1.3B, 6.7B and 66B, and BLOOM."""
    size = find_size(f"some/model-{parameters / 1e9:g}b")
    assert size is not None
    assert size.hidden == pytest.approx(hidden, rel=0.25)


@given(content=st.binary(max_size=40))
def test_a_damaged_weight_file_has_the_size_in_its_name(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "my-125m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    size = find_size(str(folder))
    assert size is not None
    assert size.parameters == 125e6


def test_shards_are_added(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED / "nano-neox-98k", tmp_path / "m")
    whole = find_size(str(tmp_path / "m"))
    for number in (1, 2):
        shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "m" / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    size = find_size(str(tmp_path / "m"))
    assert whole is not None
    assert size is not None
    assert size.parameters == 2 * whole.parameters
    assert json.loads((tmp_path / "m" / "config.json").read_text())["hidden_size"] == size.hidden
    assert (whole.embedded, whole.largest) == (2 * 1024 * 64, 1024 * 64)  # the head of nano-neox is its own
    assert (size.embedded, size.largest) == (2 * 2 * 1024 * 64, 2 * 1024 * 64)  # here one name is in both


def test_experts_of_a_layer_are_one_tensor(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.experts.{n}.w{m}.weight": (96, 64) for n in range(4) for m in (1, 2, 3)}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in {**shapes, "lm_head.weight": (512, 64)}.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 512, "hidden_size": 64}')
    size = find_size(str(tmp_path))
    assert size is not None
    assert (size.embedded, size.largest) == (512 * 64, 12 * 96 * 64)


@pytest.mark.parametrize(
    ("device", "dtype", "batch_size", "expected"),
    [
        ("cpu", "float32", 32, 0.8e9 + 4 * (2 * 1e9 + 5e7 + 16 * 2048 * 1000)),  # one window is more than the budget
        ("cuda", "float16", 32, 1e9 + 2 * (1e9 + 5e7 + 16 * 16384 * 1000)),
        ("cuda:1", "bfloat16", 1, 1e9 + 2 * (1e9 + 5e7 + 16 * 2048 * 1000)),
    ],
)
def test_memory_is_process_weights_and_states(device: str, dtype: str, batch_size: int, expected: float) -> None:
    experiment = Experiment(ModelConfig(dtype=dtype), eval=EvalConfig(tasks=(), batch_size=batch_size))
    # 50,000 x 1000: the embedding's copy, of a vocabulary that is not known
    assert estimate_memory(ModelSize(10**9, 1000, 4096, None), experiment, device) == expected
