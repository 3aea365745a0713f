"""Checkpoints of other tools are measured as what they are: their values, their real bits, under their own name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.checkpoints.export import export_checkpoint
from kbit.checkpoints.foreign import find_stored_report, read_quantized
from kbit.checkpoints.loading import load_model, pack_loaded
from kbit.checkpoints.saving import save_packed
from kbit.experiments.result import Result
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.checkpoint_files import QuantizedError
from kbit.models.loading import hash_folder
from kbit.models.loading import load_model as load_plain
from kbit.models.parameters import hash_weights
from kbit.store.records import read_as

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
TOKENS = torch.arange(40).view(2, 20)
QUICK = ("eval.tasks=[nano_cloze]", "eval.limit=10", "eval.perplexity_windows=2")
# format, preset, bits of a weight with its share of the scales as the format has them, the name in results
CASES = [
    ("bitsandbytes", "nf4", 4 + 32 / 64, "bitsandbytes nf4"),
    ("bitsandbytes", "nf4_dq", 4 + 8 / 64 + 32 / (64 * 256), "bitsandbytes nf4 double"),
    ("gptq", "int4_grid", 4 + 16 / 32, "gptq 4 bits group_size=32"),
    ("compressed-tensors", "int8_grid", 8 + 16 / 32, "compressed-tensors 8 bits group_size=32"),
]


def compute(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def export(form: str, preset: str, out: Path, name: str = "nano-neox-98k") -> Path:
    """Write a checkpoint of another tool."""
    loaded = load_plain(name)
    pack_loaded(loaded, QuantConfig.from_name(preset))
    save_packed(loaded.model, loaded.tokenizer, out.with_name("packed"))
    export_checkpoint(out.with_name("packed"), form, out)
    return out


@pytest.mark.parametrize(("form", "preset", "bits", "described"), CASES)
def test_it_has_the_values_and_the_bits_of_its_codes(
    form: str, preset: str, bits: float, described: str, tmp_path: Path
) -> None:
    out = export(form, preset, tmp_path / "out")
    fake = load_plain("nano-neox-98k").model
    report = quantize_model(fake, QuantConfig.from_name(preset))
    if form != "bitsandbytes":  # which decode to 16 bits
        for tensor in report.tensors:
            if tensor.quantized:
                parameter = fake.get_parameter(tensor.name)
                parameter.data = parameter.data.half().float()
    loaded = load_model(str(out))
    assert hash_weights(loaded.model) == hash_weights(fake)
    assert torch.equal(compute(loaded.model), compute(fake))
    assert loaded.checkpoint_quantization == described
    found = find_stored_report(loaded.model)
    assert found is not None
    assert found.bits_per_param == pytest.approx(bits, rel=0.005)  # the mean of double quantization is small
    counted = sum(weight.count_bits() for weight in read_quantized(out).values())
    rest = sum(16 * torch.Size(t.shape).numel() for t in report.tensors if not t.quantized)
    assert (found.total_bits, found.parameters) == (counted + rest, report.parameters)
    assert found.quantized_parameters == report.quantized_parameters


def test_conv1d_and_tied_heads_are_read(tmp_path: Path) -> None:
    out = export("bitsandbytes", "nf4", tmp_path / "out", "nano-gpt2-98k")
    fake = load_plain("nano-gpt2-98k").model
    quantize_model(fake, QuantConfig.from_name("nf4"))
    loaded = load_model(str(out), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(compute(load_model(str(out)).model), compute(fake))


def test_a_study_measures_it_as_it_is(kbit: Kbit, tmp_path: Path) -> None:
    export("bitsandbytes", "nf4", tmp_path / "out")
    done = kbit("run", "model.name=out", "quant.bits=16", *QUICK)
    assert done.code == 0, done.err
    assert kbit("run", "quant=nf4", *QUICK, "results=fake").code == 0
    (result,), (fake,) = (list(read_as(Result, tmp_path / name)) for name in ("results", "fake"))
    assert result.checkpoint_quantization == "bitsandbytes nf4"
    assert result.weights_hash == fake.weights_hash
    # of the same weights, whose scales have 32 bits there and 16 here
    assert result.total_bits - fake.total_bits == result.quantized_parameters * 16 // 64
    compared = ("kl_divergence", "top1_agreement")
    assert result.measurements == tuple(m for m in fake.measurements if m.metric not in compared)
    assert not any("16-bit baseline" in skipped.reason for skipped in result.skipped)
    refused = kbit("run", "model.name=out", "quant.bits=4", *QUICK)
    assert (refused.code, "is quantized by another tool already, and is not quantized again" in refused.err) == (
        1,
        True,
    )


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    out = export("gptq", "int4_grid", tmp_path / "out")
    with pytest.raises(QuantizedError, match=r"quantization_config: gptq\): `kbit run \.\.\. quant\.bits=16` and"):
        load_plain(str(out))
    with pytest.raises(ValueError, match=r"model\.adapter=a: .*out was quantized by another tool"):
        load_model(str(out), adapter="a")
    edit(out, bits=8)
    with pytest.raises(ValueError, match=r"is no gptq weight"):
        load_model(str(out))
    for fields, reason in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": False}, "only the 4-bit types are read"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "only pack-quantized is read, not float"),
        ({"quant_method": "fp8"}, "of other tools bitsandbytes, gptq, compressed-tensors and GGUF are read"),
    ):
        edit(out, **fields)
        with pytest.raises(QuantizedError, match=reason):
            load_model(str(out))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    out = export("gptq", "int4_grid", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 320}))
    with pytest.raises(ValueError, match=r"size mismatch for gpt_neox.*intermediate|size mismatch for gpt_neox.*mlp"):
        load_model(str(out))
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of GPTNeoXForCausalLM, such as gpt_neox\.layers\.2"):
        load_model(str(out))


def test_a_gguf_file_is_no_baseline_and_has_no_kl_divergence_from_itself(
    kbit: Kbit, tmp_path: Path, build_tiny: Callable[..., Any], tokenizer: Any
) -> None:
    pytest.importorskip("gguf")
    model = build_tiny("llama", vocab_size=1024, intermediate_size=192, tie_word_embeddings=True)
    model.config._name_or_path = ""
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    loaded = load_plain(str(tmp_path / "plain"))
    pack_loaded(loaded, QuantConfig.from_name("int4_grid"))
    save_packed(loaded.model, loaded.tokenizer, tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", "gguf", tmp_path / "out")
    done = kbit("run", "model.name=out", "quant.bits=16,4", "eval.tasks=[]", "eval.perplexity_windows=2", "-m",
                "hydra/launcher=basic")  # fmt: skip
    assert done.code == 0, done.err
    results = {result.experiment.quant.bits: result for result in read_as(Result, tmp_path / "results")}
    metrics = {bits: {m.metric for m in result.measurements} for bits, result in results.items()}
    assert "kl_divergence" not in metrics[16]
    assert "kl_divergence" in metrics[4]  # from the file's own values
    assert {result.checkpoint_quantization for result in results.values()} == {"gguf Q4_0"}
    weights = read_quantized(tmp_path / "out" / "model.gguf")
    quantized = sum(torch.Size(weight.shape).numel() for weight in weights.values())
    assert results[16].quantized_parameters == quantized
    assert results[16].bits_per_param == sum(w.count_bits() for w in weights.values()) / quantized == 4.5
    assert results[16].total_bits == 4.5 * quantized + 16 * (results[16].parameters - quantized)


def test_other_gguf_files_of_the_folder_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"a")
    before = hash_folder(tmp_path, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"b")
    assert hash_folder(tmp_path, tmp_path / "a.gguf") == before
    assert hash_folder(tmp_path, tmp_path / "b.gguf") != before
    shutil.copy(tmp_path / "b.gguf", tmp_path / "a.gguf")
    assert hash_folder(tmp_path, tmp_path / "a.gguf") != before
