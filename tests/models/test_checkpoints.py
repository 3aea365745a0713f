"""Checkpoints that are not plain: refused by name before they are loaded, or recorded as what they are."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.models.catalog import EMBEDDED, family_of
from kbit.models.checkpoint_files import check_folder, check_model, find_gguf
from kbit.models.config import ModelConfig
from kbit.models.loading import load_model
from kbit.models.size import find_size

NANO = EMBEDDED / "nano-neox-98k"
Tensors = dict[str, torch.Tensor]


def copy_nano(folder: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **config: Any) -> Path:
    """Copy a model's folder, with other tensors and further entries of its configuration."""
    shutil.copytree(NANO, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def to_fp8(tensors: Tensors) -> Tensors:
    """Weights as fp8 with a scale for each row, as some publish them."""
    made = dict(tensors)
    for name, w in tensors.items():
        if ".layers." in name and w.ndim == 2:
            made[name + "_scale"] = w.float().abs().amax(1, keepdim=True) / 448
            made[name] = (w.float() / made[name + "_scale"]).to(torch.float8_e4m3fn)
    return made


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (to_fp8, {}, r"gpt_neox\.layers\.\d\.\S+weight is stored as F8_E4M3.* scales"),
        (
            add("gpt_neox.layers.0.mlp.dense_4h_to_h.weight_scale", torch.ones(3)),
            {},
            "1 tensors .* such as .*weight_scale",
        ),
        (add("gpt_neox.layers.0.codes", torch.ones(3, dtype=torch.uint8)), {}, r"layers\.0\.codes is stored as U8"),
        (
            dict,
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantiz.*bitsandbytes",
        ),
        (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized checkpoint .*gptq"),
        (dict, {"compression_config": {"quant_method": "compressed-tensors"}}, "quantized checkpoint .*compressed"),
        (dict, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantized checkpoint .*fp8"),
    ],
)
def test_a_quantized_checkpoint_is_no_baseline(
    tmp_path: Path, change: Callable[[Tensors], Tensors], config: dict[str, Any], message: str
) -> None:
    folder = copy_nano(tmp_path / "m", change, **config)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name", ["gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"]
)
def test_buffers_of_older_checkpoints_are_harmless(tmp_path: Path, name: str) -> None:
    folder = copy_nano(tmp_path / "m", add(name, torch.ones(3)))
    assert load_model(str(folder)).checkpoint_quantization == ""


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            ValueError,
            "model.name=org/base model.adapter=",
        ),
        ({"config.json": "{}"}, FileNotFoundError, "has no weights as model"),
        ({"config.json": "{"}, ValueError, r"config\.json cannot be read"),
        ({"model.safetensors": ""}, FileNotFoundError, "has no config.json"),
        (
            {"a.gguf": "", "b.GGUF": ""},
            ValueError,
            r"several GGUF files \(a\.gguf, b\.GGUF\): choose one",
        ),
    ],
)
def test_a_folder_without_a_model_is_named(
    tmp_path: Path, files: dict[str, str], error: type[Exception], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        check_model(str(tmp_path))


def test_what_only_the_hub_or_a_folder_has_is_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.revision=v1: .*nano-neox-98k is a local folder"):
        check_model("nano-neox-98k", revision="v1")
    with pytest.raises(ValueError, match=r"model\.gguf_file=a\.gguf: org/name is no folder here"):
        check_model("org/name", gguf_file="a.gguf")
    with pytest.raises(FileNotFoundError, match=r"model\.gguf_file: no file at .*/none\.gguf"):
        check_model(str(tmp_path), gguf_file="none.gguf")
    check_folder(NANO)
    assert find_gguf(NANO, None) is None


def test_another_tokenizer_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    for path in NANO.glob("*token*"):
        shutil.copy(path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "mine"}))
    loaded = load_model("nano-neox-98k", tokenizer=str(folder))
    assert loaded.tokenizer.chat_template == "mine"
    assert load_model("nano-neox-98k").tokenizer.chat_template is None


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"has 1024 tokens, and the embedding of model 'nano-stories-260k' has 512 rows"
    ):
        load_model("nano-stories-260k", tokenizer="nano-neox-98k")


@pytest.mark.parametrize(
    ("place", "family"),
    [
        ("runs/a/checkpoint-1000", "runs/a"),
        ("runs/b/checkpoint-1000", "runs/b"),
        ("runs/b/final", "runs/b"),
        ("runs/a/checkpoints/step_20", "runs/a"),
        ("one/model-x", "model-x"),
    ],
)
def test_a_local_models_family_is_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, family: str
) -> None:
    (tmp_path / place).mkdir(parents=True)
    assert family_of(str(tmp_path / place)) == family
    assert family_of(str(tmp_path / place), "mine") == "mine"
    monkeypatch.chdir(tmp_path / place)
    assert family_of(".") == family


def test_parts_of_a_checkpoint_make_a_family_of_its_own() -> None:
    parts = {"revision": "step1000", "adapter": "runs/pets/checkpoint-7"}
    assert family_of("pythia-70m", None, parts) == "pythia-v1 revision=step1000 adapter=runs/pets"
    assert family_of("pythia-70m", "mine", parts) == "mine"
    assert family_of("pythia-70m", None, {"gguf_file": "m.gguf"}) == "pythia-v1"


def test_the_family_of_a_name_is_as_before() -> None:
    assert [family_of(name) for name in ("nano-opt-1m", "org/name")] == ["nano-opt", "name"]


@pytest.mark.parametrize(("given", "count"), [("1.3b", 1_300_000_000), ("350M", 350_000_000), ("12345", 12345)])
def test_a_size_that_nothing_tells_is_given(given: str, count: int) -> None:
    assert find_size("org/name") is None
    found = find_size("org/name", given)
    assert found is not None
    assert found.parameters == count
    assert find_size("nano-neox-98k", given) == find_size("nano-neox-98k")  # the files know better


@pytest.mark.parametrize("fields", [{"size": "large"}, {"size": "0"}, {"revision": ""}, {"family": ""}])
def test_a_wrong_field_of_a_model_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"model\.{next(iter(fields))}"):
        ModelConfig(**fields)


def write_gguf(path: Path, model: Any, *, quantized: bool) -> None:
    """Write a Llama model as GGUF, its matrices as Q8_0 or float32."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        tensor = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs the rotated dimensions
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        as_blocks = quantized and tensor.ndim == 2
        data = gguf.quantize(tensor, kind) if as_blocks else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind if as_blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("quantized", "recorded"), [(False, ""), (True, "gguf Q8_0")])
def test_the_only_gguf_file_of_a_folder_is_loaded_and_recorded(
    tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any, quantized: bool, recorded: str
) -> None:
    pytest.importorskip("gguf")
    model = build_tiny("llama", vocab_size=1024, intermediate_size=192)
    tokenizer.save_pretrained(tmp_path)
    write_gguf(tmp_path / "m.gguf", model, quantized=quantized)
    loaded = load_model(str(tmp_path))
    assert loaded.checkpoint_quantization == recorded
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        difference = (loaded.model(tokens).logits - model.half().float()(tokens).logits).abs().max()
    assert difference < (0.05 if quantized else 1e-4)  # 8 bits against none


@pytest.mark.skipif(find_spec("gguf") is not None, reason="the package gguf is installed")
def test_without_the_package_gguf_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    text = struct.Struct("<Q").pack  # a string's length comes before it
    key, value = b"general.architecture", b"llama"
    entry = text(len(key)) + key + struct.pack("<I", 8) + text(len(value)) + value
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(OSError, match=r"model .* cannot be loaded from .*kbit\[gguf\]"):
        load_model(str(tmp_path))
