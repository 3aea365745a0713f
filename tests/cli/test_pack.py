"""`kbit pack`, `kbit export` and packed=true, from configuration to files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kbit.experiments.result import Result
from kbit.store.readers import read_results
from kbit.store.records import read_as

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
QUICK = ("eval.tasks=[nano_cloze]", "eval.limit=10", "eval.perplexity_windows=2")
QUANT = ("quant.bits=3", "quant.outlier_fraction=0.02")


def test_a_studys_winner_is_packed_evaluated_and_exported(kbit: Kbit, tmp_path: Path) -> None:
    assert kbit("run", *QUANT, *QUICK).code == 0
    (measured,) = read_as(Result, tmp_path / "results")
    done = kbit("pack", "--from", f"results:{measured.key}", "out=packed")
    assert done.code == 0, done.err
    assert f"its weights are those that {measured.key} measured ({measured.weights_hash})" in done.out
    assert f"{measured.total_bits:,} bits counted in all; " in done.out
    memory, stored = (
        float(share) for share in re.findall(r"bytes (?:in memory|of weight files) \(\+(\d\.\d\d)%\)", done.out)
    )
    # not counted are the codes and the places of columns at 16 bits, and the files' headers
    assert 0 <= memory < 2
    assert memory < stored < 8
    assert f"By kbit, experiment {measured.key}" in (tmp_path / "packed" / "README.md").read_text()

    assert kbit("run", "model.name=packed", "quant.bits=16", *QUICK, "results=again").code == 0
    (again,) = read_as(Result, tmp_path / "again")
    assert again.checkpoint_quantization == "kbit nf3 proxy outliers 0.02"
    files = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert again.method_notes["bytes_on_disk"] == files
    assert measured.total_bits / 8 < again.method_notes["bytes_in_memory"]  # what is not packed computes in float32
    assert (again.weights_hash, again.total_bits) == (measured.weights_hash, measured.total_bits)
    assert (again.bits_per_param, again.parameters) == (measured.bits_per_param, measured.parameters)
    assert again.measurements == tuple(
        m for m in measured.measurements if m.metric not in ("kl_divergence", "top1_agreement")
    )

    refused = kbit("run", "model.name=packed", "quant.bits=4", *QUICK)
    assert (refused.code, "is packed by kbit already, and is not quantized again" in refused.err) == (1, True)
    refused = kbit("export", "packed", "--format", "gptq", "--out", "there")
    assert (refused.code, "no place for columns at 16 bits" in refused.err) == (1, True)


def test_weights_that_are_not_those_measured_are_not_packed(kbit: Kbit, tmp_path: Path) -> None:
    assert kbit("run", *QUANT, *QUICK).code == 0
    (path,) = (tmp_path / "results" / "experiments").glob("*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"weights_hash": "0" * 32}))
    done = kbit("pack", "--from", f"results:{record['key']}", "out=packed")
    assert done.code == 1
    assert re.search(f"hash {record['weights_hash']} here, and those that were measured 0000", done.err)
    assert not (tmp_path / "packed").exists()


def test_a_packed_study_has_the_same_numbers(kbit: Kbit, tmp_path: Path) -> None:
    for results, more in (("plain", ()), ("packed", ("packed=true",))):
        done = kbit("run", *QUANT, *QUICK, f"results={results}", *more)
        assert done.code == 0, done.err
    (plain,), (packed,) = (list(read_as(Result, tmp_path / name)) for name in ("plain", "packed"))
    compared = ("kl_divergence", "top1_agreement")  # with the 16-bit model, which there is none of
    assert packed.measurements == tuple(m for m in plain.measurements if m.metric not in compared)
    for name in ("key", "weights_hash", "total_bits", "bits_per_param", "coverage", "skipped", "checkpoint_dtype"):
        assert getattr(packed, name) == getattr(plain, name), name
    assert packed.weight_rmse == pytest.approx(plain.weight_rmse)
    assert packed.experiment.packed
    assert len(read_results(tmp_path / "packed")) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "quant.bits=4"], "kbit pack needs out=FOLDER"),
        (["pack", "quant.bits=4", "out=."], "out=. exists already"),
        (["pack", "quant.bits=3,4", "out=x"], "quant.bits"),
        (["pack", "quant.bits=16", "out=x"], "quantizes nothing"),
        (["pack", "quant.bits=8", "quant.method=llm_int8", "out=x"], "cannot be packed"),
        (["pack", "--from", "nowhere", "out=x"], "is no RESULTS:KEY"),
        (["pack", "--from", "a:b", "quant.bits=3", "out=x"], "takes its keys from the result"),
        (["export", "none", "--format", "gptq", "--out", "x"], "holds no packed checkpoint of kbit"),
        (["export", "none", "--format", "gguff", "--out", "x"], "did you mean gguf?"),
        (["run", "packed=true", "model.adapter=a", "quant.bits=4"], "adapter"),
    ],
)
def test_wrong_input_is_refused_with_what_to_do(kbit: Kbit, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    done = kbit(*arguments)
    assert (done.code, message in done.err) == (1, True), done.err
    assert not (tmp_path / "x").exists()


def test_only_the_device_is_given_beside_a_stored_result(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("pack", "--from", "results:0", "device=cuda:7x", "out=packed")
    assert (done.code, "device='cuda:7x' is not one of: cpu, cuda, cuda:N" in done.err) == (1, True)
    done = kbit("pack", "--from", "results:0", "device=cpu", "out=packed")
    assert (done.code, "results" in done.err) == (1, True)  # there is no such store


def test_help_says_what_they_do(kbit: Kbit) -> None:
    assert "--from RESULTS:KEY" in kbit("pack", "--help").out
    assert "bitsandbytes, gguf, compressed-tensors, gptq" in kbit("export", "--help").out


def test_the_commands_formats_are_those_that_are_written() -> None:
    from kbit.checkpoints.export import FORMATS as written
    from kbit.cli.pack import FORMATS

    assert sorted(FORMATS) == sorted(written)
