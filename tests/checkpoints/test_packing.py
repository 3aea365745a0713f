"""Packed models: they compute what fake quantization computes, and are saved, loaded and made plain bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline
from transformers.quantizers import auto

from kbit.checkpoints.config import KbitConfig
from kbit.checkpoints.export import export_checkpoint
from kbit.checkpoints.loading import load_model, pack_loaded, pack_model
from kbit.checkpoints.packing import compute_exactly, find_packed_report, hash_values, list_packed
from kbit.checkpoints.saving import save_packed
from kbit.layers.quantized_linear import QuantizedLinear
from kbit.methods.config import CalibrationConfig, QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import QuantizationReport
from kbit.models.checkpoint_files import QuantizedError
from kbit.models.loading import load_model as load_plain
from kbit.models.parameters import hash_weights
from kbit.numerics.codebooks import ADAPTIVE
from kbit.numerics.quantized_tensor import QuantizedTensor

NEOX, GPT2 = "nano-neox-98k", "nano-gpt2-98k"
TOKENS = torch.arange(40).view(2, 20)
SMALL = CalibrationConfig(samples=4, length=32)
# Each data type, scale format, normalization, layout and method once, over four architectures
CASES = [
    (GPT2, QuantConfig(bits=4, data_type="int", normalization="minmax", centering=True)),
    ("nano-opt-98k", QuantConfig(bits=3, data_type="dynamic", outlier_fraction=0.05)),
    ("nano-bloom-98k", QuantConfig(bits=5, data_type="quantile", block_size=None)),
    (NEOX, QuantConfig(bits=6, data_type="float", scale_format="dq8", rounding="stochastic", seed=3)),
    (NEOX, QuantConfig(bits=2, data_type="int", scale_format="e8m0", layout="row", method="mse")),
    (GPT2, QuantConfig(bits=3, method="awq", calibration=SMALL)),
    (GPT2, QuantConfig(bits=8, data_type="nf", scale_format="bf16", include="wte")),  # the head is tied to it
]


def compute(model: Any) -> torch.Tensor:
    """Logits by the path of tiles, whose bits are those of fake quantization."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.fused_rows = 0
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def read_report(model: Any) -> QuantizationReport:
    """The count of bits of a packed model."""
    report = find_packed_report(model)
    assert report is not None
    return report


def count_uncounted(q: QuantizedTensor) -> float:
    """Bytes that are stored and not counted: codes and places of outlier columns, half of each value of a codebook."""
    codebook = 2 * 2**q.spec.bits if q.spec.data_type in ADAPTIVE else 0
    if q.outlier_values is None or q.outlier_columns is None:
        return codebook
    return codebook + q.outlier_values.numel() * q.spec.bits / 8 + q.outlier_columns.nbytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint: 4-bit NormalFloat."""
    loaded, path = load_plain(NEOX), tmp_path_factory.mktemp("packed") / "model"
    pack_loaded(loaded, QuantConfig(bits=4))
    save_packed(loaded.model, loaded.tokenizer, path, made_of=NEOX, measured="| perplexity | 45.8 |")
    return path


@pytest.mark.parametrize(("name", "quant"), CASES, ids=lambda case: case if isinstance(case, str) else case.label())
def test_a_packed_model_is_the_fake_quantized_one_wherever_it_goes(
    name: str, quant: QuantConfig, tmp_path: Path
) -> None:
    fake, loaded = load_plain(name), load_plain(name)
    report = quantize_model(fake.model, quant, fake.tokenizer)
    expected = compute(fake.model)
    made, weights_hash = pack_loaded(loaded, quant)
    assert (made, made.total_bits) == (report, read_report(loaded.model).total_bits)
    assert weights_hash == hash_weights(fake.model)

    save_packed(loaded.model, loaded.tokenizer, tmp_path, max_shard_size="200KB")
    again = load_model(str(tmp_path))
    assert torch.equal(compute(again.model), expected)
    assert hash_values(again.model) == weights_hash
    assert read_report(again.model).total_bits == report.total_bits
    stored = sum(tensor.nbytes for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values())
    counted = report.total_bits / 8 + sum(count_uncounted(m.quantized) for m in list_packed(again.model).values())
    assert stored == pytest.approx(counted, rel=0.005)

    asked = load_model(name, packed_as=quant)
    assert torch.equal(compute(asked.model), expected)
    assert hash_values(asked.model) == weights_hash
    assert read_report(asked.model).weight_rmse == pytest.approx(report.weight_rmse, rel=1e-5)

    compute_exactly(asked.model)
    assert torch.equal(compute(asked.model), expected)
    again.model.dequantize()  # type: ignore[no-untyped-call]
    assert torch.equal(compute(again.model), expected)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_fused_experts_are_packed_each_by_itself(
    architecture: str, tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any
) -> None:
    quant = QuantConfig(bits=4, block_size=32)
    fake, packed = build_tiny(architecture, vocab_size=1024), build_tiny(architecture, vocab_size=1024)
    packed.save_pretrained(tmp_path / "plain")
    fake.config._experts_implementation = "eager"
    quantize_model(fake, quant)
    expected = compute(fake)
    pack_model(packed, quant)
    assert torch.equal(compute(packed), expected)
    packed.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(compute(again), expected)
    assert hash_values(again) == hash_weights(fake)
    asked = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=KbitConfig(bits=4, block_size=32)
    )
    assert torch.equal(compute(asked), expected)
    asked.save_pretrained(tmp_path / "again")
    assert torch.equal(compute(load_as_it_is(tmp_path / "again")), expected)
    again.dequantize()  # type: ignore[no-untyped-call]
    assert torch.equal(compute(again), expected)


def load_as_it_is(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_transformers_copies_casts_and_generates(folder: Path) -> None:
    loaded = load_model(str(folder))
    expected = compute(loaded.model)
    assert torch.equal(compute(copy.deepcopy(loaded.model)), expected)
    assert torch.equal(compute(pickle.loads(pickle.dumps(loaded.model))), expected)
    there: Any = loaded.model
    there = there.to(torch.bfloat16).to(torch.float32)  # the packed bytes are no numbers to round
    for name, module in list_packed(load_model(str(folder)).model).items():
        assert torch.equal(there.get_submodule(name).dequantize(), module.dequantize())
    plain = load_plain(NEOX)
    quantize_model(plain.model, QuantConfig(bits=4))
    asked = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    generate: Any = pipeline
    texts = [
        generate("text-generation", model=model, tokenizer=plain.tokenizer)("Once upon a", generation_config=asked)
        for model in (load_model(str(folder)).model, plain.model)
    ]
    assert texts[0] == texts[1]


def test_transformers_quantizes_by_a_method_with_a_text() -> None:
    from kbit.models.catalog import locate_model

    fake = load_plain(NEOX)
    quantize_model(fake.model, QuantConfig(bits=3, method="gptq", calibration=SMALL), fake.tokenizer)
    config = KbitConfig(bits=3, method="gptq", calibration={"samples": 4, "length": 32})
    model = AutoModelForCausalLM.from_pretrained(locate_model(NEOX), quantization_config=config, dtype=torch.float32)
    assert torch.equal(compute(model), compute(fake.model))


def test_the_card_says_what_it_is_and_what_was_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "4.25 bits per parameter of the 8 weight matrices" in card
    assert "    bits: 4\n    data_type: nf\n" in card
    assert card.endswith("## Measured\n\n| perplexity | 45.8 |\n")


def test_a_packed_model_is_not_quantized_again(folder: Path) -> None:
    loaded = load_model(str(folder))
    with pytest.raises(ValueError, match="already quantized with"):
        quantize_model(loaded.model, QuantConfig(bits=3))
    with pytest.raises(ValueError, match="already quantized with"):
        pack_model(loaded.model, QuantConfig(bits=4))
    with pytest.raises(QuantizedError, match=r"packed by kbit: `kbit run` and kbit\.load_model take it"):
        load_plain(str(folder))


def test_a_layer_that_has_no_packed_twin_is_refused_before_anything_changes() -> None:
    loaded = load_plain(NEOX)
    before = hash_weights(loaded.model)
    with pytest.raises(ValueError, match=r"final_layer_norm\.weight of LayerNorm cannot be packed.*quant\.exclude"):
        pack_model(loaded.model, QuantConfig(bits=4, include="final_layer_norm"))
    assert hash_weights(loaded.model) == before
    assert not list_packed(loaded.model)


def test_without_kbit_transformers_gives_no_random_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kbit was not imported: transformers warns of an unknown kind and would fill what it does not find."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "kbit")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "kbit")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_only_a_packed_checkpoint_is_exported(folder: Path, tmp_path: Path) -> None:
    from kbit.models.catalog import locate_model

    with pytest.raises(ValueError, match="holds no packed checkpoint of kbit"):
        export_checkpoint(locate_model(NEOX), "gptq", tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(folder, "gptq", folder)
    with pytest.raises(ValueError, match=r"query_key_value: gptq stores integers.*int4_grid.*and 5 more"):
        export_checkpoint(folder, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
