"""What is refused before a packed model computes: damage, lies, configurations that disagree, layers used otherwise."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.loading import load_packed, pack_loaded, pack_model
from kbit.checkpoints.packing import check_layer, compute_exactly, list_packed
from kbit.checkpoints.saving import save_packed
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.loading import load_model as load_plain

DENSE = "gpt_neox.layers.0.attention.dense.weight"
TOKENS = torch.arange(40).view(2, 20)


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint: 4-bit NormalFloat, 3 columns of each matrix at 16 bits."""
    loaded, path = load_plain("nano-neox-98k"), tmp_path_factory.mktemp("packed") / "model"
    pack_loaded(loaded, QuantConfig(bits=4, outlier_fraction=0.05, outlier_selection="column"))
    save_packed(loaded.model, loaded.tokenizer, path)
    return path


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change a tensor of the weight file, or leave it out."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, path, metadata=metadata)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = False) -> None:
    """Change config.json. With sign, the weight file says that it was packed so."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if sign:
        path, found = folder / "model.safetensors", KbitConfig(**config["quantization_config"])
        save_file(load_file(path), path, metadata={"format": "pt", "kbit": found.fingerprint})


def edit_quantizer(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(fields))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "codes that are truncated": (
        lambda f: change_tensor(f, DENSE, lambda codes: codes[:-8].clone()),
        rf"{DENSE} is bytes \[2040\], and config.json asks for bytes \[2048\]",
    ),
    "scales that are truncated": (
        lambda f: change_tensor(f, DENSE.replace("weight", "scales"), lambda scales: scales[:-2].clone()),
        r"dense.scales is bytes \[126\], and config.json asks for bytes \[128\]",
    ),
    "codes of another type": (
        lambda f: change_tensor(f, DENSE, lambda codes: codes.float()),
        rf"{DENSE} is numbers \[2048\], and config.json asks for bytes \[2048\]",
    ),
    "codes that are not there": (
        lambda f: change_tensor(f, DENSE, lambda _: None),
        rf"lacks 1 tensors, such as {DENSE}|has no codes for {DENSE.removesuffix('.weight')}",
    ),
    "columns beyond the inputs": (
        lambda f: change_tensor(
            f,
            DENSE.replace("weight", "outlier_columns"),
            lambda raw: torch.tensor([1, 2, 64]).view(torch.uint8),
        ),
        r"dense keeps the columns \[1, 2, 64\] of 64 inputs at 16 bits: its codes are damaged",
    ),
    "columns before the inputs": (
        lambda f: change_tensor(
            f,
            DENSE.replace("weight", "outlier_columns"),
            lambda raw: torch.tensor([-1, 2, 3]).view(torch.uint8),
        ),
        r"dense keeps the columns \[-1, 2, 3\] of 64 inputs",
    ),
    "a larger layer": (
        lambda f: edit_config(f, lambda c: c.update(intermediate_size=320)),
        r"mlp\.dense_\w+\.\w+ is \w+ \[\d+\], and config.json asks for \w+ \[\d+\]",
    ),
    "a larger vocabulary": (
        lambda f: edit_config(f, lambda c: c.update(vocab_size=2048)),
        r"embed\w+\.weight is numbers \[1024, 64\], and config.json asks for numbers \[2048, 64\]",
    ),
    "more layers": (
        lambda f: edit_config(f, lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1)),
        r"lacks \d+ tensors, such as gpt_neox\.layers\.2",
    ),
    "other bits": (edit_quantizer(bits=3), r"packed in another way"),
    "other bits, signed": (
        lambda f: edit_config(f, lambda c: c["quantization_config"].update(bits=3), sign=True),
        r"weight is bytes \[\d+\], and config.json asks for bytes \[\d+\]",
    ),
    "another block size, signed": (
        lambda f: edit_config(f, lambda c: c["quantization_config"].update(block_size=32), sign=True),
        r"scales is bytes \[\d+\], and config.json asks for bytes \[\d+\]",
    ),
    "another data type": (edit_quantizer(data_type="int"), r"packed in another way.*'data_type': 'int'"),
    "another dtype": (edit_quantizer(weight_dtype="float16"), r"packed in another way"),
    "another exclude": (edit_quantizer(exclude="mlp"), r"packed in another way.*'exclude': 'mlp'"),
    "no columns": (edit_quantizer(parts={}), r"packed in another way"),
    "a file that is cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]),
        r"model\.safetensors is damaged|cannot be loaded.*incomplete|not fully covered",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_lying_checkpoint_is_refused_by_its_own_message(folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        load_packed(str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 3}, r"bits=4 in the checkpoint, bits=3 asked"),
        ({"data_type": "int"}, r"data_type='nf' in the checkpoint, data_type='int' asked"),
        ({"outlier_fraction": 0.1}, r"outlier_fraction=0\.05 in the checkpoint, outlier_fraction=0\.1 asked"),
        ({"method": "mse"}, r"method='rtn' in the checkpoint, method='mse' asked"),
        ({"weight_dtype": "bfloat16"}, r"weight_dtype='float32' in the checkpoint, 'bfloat16' asked"),
    ],
)
def test_a_configuration_that_disagrees_with_the_checkpoint_is_refused(
    folder: Path, asked: dict[str, Any], message: str
) -> None:
    fields: dict[str, Any] = {"bits": 4, "outlier_fraction": 0.05, "outlier_selection": "column"} | asked
    warned = pytest.warns(UserWarning, match="already has a `quantization_config`")  # by transformers
    with warned, pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=KbitConfig(**fields))


def test_a_configuration_that_agrees_is_taken(folder: Path) -> None:
    asked = KbitConfig(bits=4, outlier_fraction=0.05, outlier_selection="column", min_coverage=0.5)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, dtype=torch.float32)
    expected = load_packed(str(folder)).model
    for module in (model, expected):
        compute_exactly(module)
    assert torch.equal(compute(model), compute(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 16}, r"quant\.bits=16 quantizes nothing"),
        ({"bits": 8, "method": "llm_int8"}, r"multiplies int8 by int8.*int8_rowwise"),
        ({"rules": [{"match": "mlp", "bits": 3}]}, r"one quantizer for all of its weights: it has no quant\.rules"),
        ({"bitz": 4}, r"no field 'bitz'; did you mean bits\?"),
        ({"weight_dtype": "float31"}, r"weight_dtype='float31' is no dtype"),
        ({"quant_method": "gptq"}, r"quant_method='gptq' is not 'kbit'"),
        ({"method": "gptx"}, r"quant\.method='gptx' is not one of"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KbitConfig(**fields)


def test_a_class_derived_from_linear_is_no_linear_layer() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).topk(1).indices

    model = nn.Sequential(nn.Linear(8, 8), Router(8, 8), FalconLinear(8, 8))
    with pytest.raises(ValueError, match=r"1\.weight of Router cannot be packed"):
        check_layer(model, "1.weight")
    for name in ("0.weight", "2.weight"):
        check_layer(model, name)


def test_a_layer_whose_weight_the_model_reads_itself_is_not_packed() -> None:
    """Mamba casts states to lm_head.weight.dtype, which would be that of bytes, and multiplies by dt_proj.weight."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "intermediate_size": 64}
    config = MambaConfig(**sizes, num_hidden_layers=1, time_step_rank=4, tie_word_embeddings=False, use_mambapy=False)
    model: Any = MambaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"lm_head\.weight cannot be packed: MambaForCausalLM\.forward computes"):
        pack_model(model, QuantConfig(bits=4, include="lm_head", exclude="dt_proj"))
    with pytest.raises(ValueError, match=r"dt_proj\.weight cannot be packed: MambaMixer\.forward computes with"):
        pack_model(model, QuantConfig(bits=4))
    fake, quant = copy.deepcopy(model), QuantConfig(bits=4, exclude="dt_proj")
    quantize_model(fake, quant)
    pack_model(model, quant)
    compute_exactly(model)
    assert torch.equal(compute(model), compute(fake))


def test_inputs_that_were_cast_to_bytes_are_refused(folder: Path) -> None:
    layer: Any = load_packed(str(folder)).model.get_submodule(DENSE.removesuffix(".weight"))
    with pytest.raises(TypeError, match=r"inputs of torch\.uint8 are no numbers.*quant\.exclude"):
        layer(torch.ones(2, 64).to(layer.weight.dtype))


@pytest.mark.parametrize("asked", [None, torch.float16])
def test_a_model_that_is_made_plain_has_one_dtype(folder: Path, tmp_path: Path, asked: torch.dtype | None) -> None:
    """The weights were packed as float32, and the model is loaded in bfloat16, or moved to it afterwards."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    moved: Any = load_packed(str(folder)).model
    moved = moved.to(torch.bfloat16)
    for model in (loaded, moved):
        model.dequantize(**({} if asked is None else {"dtype": asked}))
        assert {parameter.dtype for parameter in model.parameters()} == {asked or torch.bfloat16}
        assert compute(model).isfinite().all()
        assert not list_packed(model)


def test_saving_says_that_the_rest_is_in_32_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_plain("nano-neox-98k")
    pack_model(loaded.model, QuantConfig(bits=4))
    with caplog.at_level(logging.WARNING):
        save_packed(loaded.model, loaded.tokenizer, tmp_path / "wide")
    (said,) = caplog.messages
    words = (
        r"\d+ tensors that are not packed are saved in float32, with (\d\.\d) MB: model\.to\(torch\.float16\) before"
    )
    found = re.match(words, said)
    assert found is not None
    wide: Any = loaded.model
    save_packed(wide.to(torch.float16), loaded.tokenizer, tmp_path / "half")
    assert len(caplog.messages) == 1
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "half")]
    assert sizes[0] - sizes[1] == pytest.approx(float(found[1]) * 1e6 / 2, rel=0.1)
