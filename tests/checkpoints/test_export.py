"""Exported checkpoints, each loaded by its own tool on the CPU: their weights are bit for bit those of kbit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kbit.checkpoints.export import TENSOR_FORMATS, Layers, export_checkpoint
from kbit.checkpoints.foreign import read_quantized
from kbit.checkpoints.formats.plain import NotExactError
from kbit.checkpoints.loading import pack_loaded, pack_model
from kbit.checkpoints.packing import list_codes
from kbit.checkpoints.saving import save_packed
from kbit.methods.config import QuantConfig
from kbit.models.loading import load_model
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.quantizer import quantize


def pack(name: str, quant: QuantConfig, folder: Path) -> dict[str, QuantizedTensor]:
    """Write a packed checkpoint, and return its weights."""
    loaded = load_model(name)
    pack_loaded(loaded, quant)
    save_packed(loaded.model, loaded.tokenizer, folder)
    return dict(list_codes(loaded.model))


@pytest.mark.parametrize(
    ("name", "preset"), [("nano-neox-98k", "nf4_dq"), ("nano-gpt2-98k", "nf4"), ("nano-opt-98k", "fp4_bnb")]
)
def test_bitsandbytes_loads_what_was_exported(name: str, preset: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    codes = pack(name, QuantConfig.from_name(preset), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", "bitsandbytes", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {f"{name}.weight" for name in layers} == codes.keys()
    for layer, module in layers.items():
        decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(decoded.float(), codes[f"{layer}.weight"].dequantize())
    read = read_quantized(tmp_path / "out")
    assert all(torch.equal(read[n].dequantize(), codes[n].dequantize()) for n in codes)


@pytest.mark.parametrize("preset", ["int4_grid", "int8_grid"])
def test_compressed_tensors_loads_what_was_exported(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    codes = pack("nano-neox-98k", QuantConfig.from_name(preset), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    with torch.no_grad():
        model(torch.arange(9)[None])  # on the CPU it decompresses at the first call
    for name, tensor in codes.items():
        assert torch.equal(model.get_parameter(name), tensor.dequantize().half())
    read = read_quantized(tmp_path / "out")
    assert all(torch.equal(read[n].dequantize(), codes[n].dequantize().half()) for n in codes)


def test_gptqs_checkpoint_is_read_back(tmp_path: Path) -> None:
    """No tool of GPTQ runs on the CI's CPU. test_formats.py compares the layout with its definition."""
    codes = pack("nano-neox-98k", QuantConfig.from_name("int4_grid"), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", "gptq", tmp_path / "out")
    read = read_quantized(tmp_path / "out")
    assert read.keys() == codes.keys()
    assert all(torch.equal(read[n].dequantize(), codes[n].dequantize().half()) for n in codes)


@pytest.mark.parametrize("preset", ["int4_grid", "gguf_q5_1", "gguf_iq4_nl"])
def test_gguf_decodes_each_tensor_of_the_file(preset: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    codes = pack("nano-gpt2-98k", QuantConfig.from_name(preset), tmp_path / "packed")
    done = export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out")
    assert "has no tokenizer" not in done
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == 1024
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for name, tensor in codes.items():
        stored = tensors[names.get_name(name, (".weight",))]
        decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
        assert np.array_equal(decoded, tensor.dequantize().numpy())
    read = read_quantized(tmp_path / "out" / "model.gguf")
    assert len(read) == len(codes)


def test_transformers_loads_the_gguf_file_of_a_llama(
    tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any
) -> None:
    """Its query and key layers have their outputs in another order there."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    sizes = {"intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 32}
    model = build_tiny("llama", vocab_size=1030, attention_bias=True, **sizes)
    layer = model.model.layers[0].self_attn
    torch.nn.init.normal_(layer.q_proj.bias, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.k_proj.bias, generator=torch.Generator().manual_seed(1))
    heads = model.config.num_attention_heads
    pack_model(model, QuantConfig.from_name("int8_grid"))
    save_packed(model, tokenizer, tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    for name, tensor in list_codes(model).items():
        assert torch.equal(loaded.get_parameter(name), tensor.dequantize())
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == 1030
    assert [reader.get_field(f"llama.attention.{part}_length").contents() for part in ("key", "value")] == [32, 32]
    biases = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.endswith(".bias")}
    for part, count, expected in (("q", heads, layer.q_proj.bias), ("k", 2, layer.k_proj.bias)):
        stored = biases[f"blk.0.attn_{part}.bias"].reshape(count, 16, 2)  # pairs of rotated dimensions
        halves = np.concatenate([stored[..., 0], stored[..., 1]], axis=1)  # as transformers rotates them
        assert np.array_equal(halves.ravel(), expected.detach().numpy())


def test_rotations_that_gguf_has_not_leave_no_folder(
    tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any
) -> None:
    pytest.importorskip("gguf", reason="needs gguf")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = build_tiny("llama", vocab_size=1024, intermediate_size=192, rope_parameters=rope)
    pack_model(model, QuantConfig.from_name("int8_grid"))
    save_packed(model, tokenizer, tmp_path / "packed")
    with pytest.raises(NotExactError, match="plain rotary embeddings, not linear"):
        export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "quant", "form", "message"),
    [
        ("nano-neox-98k", QuantConfig.from_name("int4_grid"), "gguf", "not of gpt_neox"),
        ("nano-gpt2-98k", QuantConfig.from_name("int4_grid"), "gptq", "weight of a Conv1D"),
        ("nano-stories-260k", QuantConfig.from_name("nf4"), "bitsandbytes", r"172 inputs and quant\.block_size=64"),
        ("nano-gpt2-98k", QuantConfig(bits=4, include="wte"), "bitsandbytes", "an embedding or a fused expert"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused(
    name: str, quant: QuantConfig, form: str, message: str, tmp_path: Path
) -> None:
    if form == "gguf":
        pytest.importorskip("gguf", reason="needs gguf")
    pack(name, quant, tmp_path / "packed")
    with pytest.raises(NotExactError, match=message):
        export_checkpoint(tmp_path / "packed", form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_kind_that_is_not_known_is_named(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("plain", np.ones((2, 32), np.float32))
    writer.add_tensor("odd", np.zeros((2, 210), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="odd has blocks of Q6_K; only Q4_0"):
        read_quantized(tmp_path / "model.gguf")


def test_a_checkpoint_of_another_kind_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ValueError, match="awq is none of bitsandbytes, gptq, compressed-tensors"):
        read_quantized(tmp_path)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_layers_with_several_block_sizes_are_refused(
    form: str, tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any
) -> None:
    """A block of 128 is longer than the rows of 64 inputs, and not than those of 128."""
    model = build_tiny("llama", vocab_size=1024, intermediate_size=128)
    pack_model(model, dataclasses.replace(QuantConfig.from_name("int4_grid"), block_size=128))
    save_packed(model, tokenizer, tmp_path / "packed")
    with pytest.raises(NotExactError, match=f"{form} has one group_size for all layers.*64 .*128 "):
        export_checkpoint(tmp_path / "packed", form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bitsandbytes_is_told_that_no_layer_is_plain() -> None:
    """Without the list, transformers would leave out the head, which is packed."""
    weights = quantize(torch.ones(64, 64), QuantConfig.from_name("nf4").spec)
    described = TENSOR_FORMATS["bitsandbytes"].describe(Layers({"lm_head": weights}, ()))
    assert described["llm_int8_skip_modules"] == []
