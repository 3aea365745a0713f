"""`kbit bench`, and time and memory as `kbit run` measures them: what is printed and written, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kbit.costs.bench import Benched, Variant, make_rival
from kbit.costs.bench_tables import tabulate_bench, write_costs, write_times
from kbit.evaluation.measurement import Measurement
from kbit.evaluation.speed.record import BatchRecord, SpeedRecord
from kbit.models.config import ModelConfig

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
QUICK = ("eval.speed.batches=[1,2]", "eval.speed.prompt=8", "eval.speed.new=2", "eval.speed.repetitions=1")
MODEL = ModelConfig("nano-neox-98k")


def make_benched(name: str, bits: int, milliseconds: dict[int, float]) -> Benched:
    """What was measured of a variant whose step reads 8 MB, where the machine reads 4 GB/s. Batch 32 does not fit."""
    batches = (
        *(BatchRecord(batch, "", "fused 8", "tile 8", 9_000_000) for batch in milliseconds),
        BatchRecord(32, "oom", "", ""),
    )
    record = SpeedRecord("Toy CPU", 2, 8, 2, 1, (40.0, 42.0), (3.0, 5.0), 8_000_000, 7.5e6, 8_000_000, 1.0, batches)
    numbers = {"weight_megabytes": 8.0, "load_seconds": 0.5, "matmul_gigaflops": 41.0, "read_gigabytes_per_second": 4.0}
    measurements = [Measurement("speed", metric, value, value, value, 1) for metric, value in numbers.items()]
    for batch, ms in milliseconds.items():
        measurements.append(Measurement(f"speed/batch_{batch}", "ms_per_token", ms, ms, ms, 7))
        measurements.append(Measurement(f"speed/batch_{batch}", "prompt_tokens_per_second", 100.0 * batch, 0, 0, 7))
    variant = Variant(MODEL, name, bits, lambda: (None, None))
    rounds = {batch: (0.9 * ms, 2 * ms, *[ms] * 5) for batch, ms in milliseconds.items()}
    return Benched(variant, "", "bfloat16", record, tuple(measurements), rounds)


def test_the_table_has_times_beside_the_fastest_plain_variant() -> None:
    gone = Benched(Variant(MODEL, "fp32", 32, lambda: (None, None)), "oom beside 3 others")
    table = tabulate_bench(
        [
            make_benched("nf4", 4, {1: 4.0, 8: 1.0}),
            make_benched("bf16", 16, {1: 8.0, 8: 1.5}),
            make_benched("fp16", 16, {1: 6.0, 8: 2.0}),
            gone,
        ]
    )
    times = write_times(table)
    assert times["precision"].tolist() == ["nf4", "bf16", "fp16", "fp32"]
    assert times["batch 1"].tolist() == ["4 (1.50x)", "8 (0.75x)", "6 (1.00x)", "oom beside 3 others"]
    assert times["batch 8"].tolist() == ["1 (1.50x)", "1.5 (1.00x)", "2 (0.75x)", "oom beside 3 others"]
    assert times["batch 32"].tolist() == [*["oom"] * 3, "oom beside 3 others"]
    first = table.iloc[0]
    assert first["read_share"] == pytest.approx(8e6 / (4e-3 * 4e9))  # a step of 4 ms could read 16 MB
    assert table.iloc[1]["read_share"] == pytest.approx(8e6 / (8 * 1e-3 * 4e9))  # a step of batch 8 takes 8 ms
    costs = write_costs(table)
    assert costs.iloc[0].tolist() == [MODEL.name, "nf4", "8", "7.5", "9", "0.5", "800", "50%", "fused 8"]


def test_a_speedup_is_that_of_the_rounds() -> None:
    """Both are slow in the same rounds, so that the ratios tell them apart, and the medians' intervals do not."""
    slow, noise = make_benched("bf16", 16, {1: 4.0}), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    plain = dataclasses.replace(slow, rounds={1: noise})
    faster = dataclasses.replace(make_benched("nf4", 4, {1: 3.6}), rounds={1: tuple(0.9 * value for value in noise)})
    alike = dataclasses.replace(make_benched("nf3", 3, {1: 4.0}), rounds={1: (2.0, 1.0, 3.0, 4.0, 5.0, 7.0, 6.0)})
    table = tabulate_bench([plain, faster, alike])
    assert write_times(table)["batch 1"].tolist() == ["4 (1.00x)", "3.6 (1.11x)", "4 (1.00x, not told apart)"]


def test_plain_float32_has_32_bits() -> None:
    assert [make_rival(MODEL, name, "cpu").bits for name in ("bf16", "fp32")] == [16, 32]
    table = tabulate_bench([make_benched("fp32", 32, {1: 2.0}), make_benched("bf16", 16, {1: 4.0})])
    assert table[table["batch"] == 1]["speedup"].tolist() == [1.0, 0.5]


def test_what_does_not_fit_beside_others_is_kept_and_says_so(
    kbit: Kbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("kbit.costs.bench._load_bitsandbytes", fail)
    monkeypatch.setattr("kbit.costs.bench.check_rival", lambda name: None)
    done = kbit("bench", "quant=nf4", "bench.against=bf16,bitsandbytes", *QUICK, "out=there")
    assert done.code == 0, done.err
    [row] = [line for line in (tmp_path / "there" / "bench.md").read_text().splitlines() if "bitsandbytes nf4" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["oom beside 2 others"] * 2 + ["-"] * 7


def test_variants_are_measured_side_by_side_and_written(kbit: Kbit, tmp_path: Path) -> None:
    done = kbit("bench", "quant=nf4,nf3", "bench.against=bf16", *QUICK, "out=there")
    assert done.code == 0, done.err
    assert "nano-neox-98k: nf4 (float32), nf3 (float32), bf16" in done.out
    assert "GB/s read" in done.out
    table = pd.read_csv(tmp_path / "there" / "bench.csv", comment="#")
    assert table["precision"].unique().tolist() == ["nf4 (float32)", "nf3 (float32)", "bf16"]
    assert table["batch"].tolist() == [1, 2] * 3
    assert (table["ms_per_token"] > 0).all()
    assert set(table["path"]) == {"fused 8, plain 1", "plain 9"}
    assert table["dtype"].unique().tolist() == ["float32", "bfloat16"]
    plain = table[table["precision"] == "bf16"].iloc[0]
    assert plain["weight_megabytes"] == plain["counted_megabytes"]
    text = (tmp_path / "there" / "bench.md").read_text()
    assert "| model | precision | batch 1 | batch 2 | weights MB |" in text
    assert {path.suffix for path in (tmp_path / "there").iterdir()} == {".csv", ".md", ".png", ".svg", ".tex"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("bench.against=bf17",),
            "bench.against='bf17' is not one of: bf16, fp16, fp32, bitsandbytes; did you mean bf16?",
        ),
        (("bench.againts=bf16",), "the key='bench.againts' is not one of: bench.against; did you mean bench.against?"),
        (("out=",), "out= needs a value"),
        (("eval.speed.prompt=300",), "eval.speed.prompt=300 and eval.speed.new=32 are more tokens than the model's"),
        (("eval.speed.batches=[0]",), "eval.speed.batches=[0] are not one or several different numbers >= 1"),
        (("eval.speed.prompt=8,9",), "eval.speed and device are the same for all that is measured side by side"),
        (("model.name=nano-neox-98x",), "nano-neox-98k"),
        (("train=qat", "train.steps=3"), "kbit bench takes no key train:"),
        (("packed=false",), "kbit bench takes no key packed:"),
        (("eval.perplexity=nano",), "kbit bench takes no key eval.perplexity:"),
        (("eval.speed.measure=false",), "kbit bench takes no key eval.speed.measure:"),
        (("+sweeps=nano/speed",), "kbit bench takes no key +sweeps:"),
        (("quant.rules=[{match:dense_4h_to_h,bits:8}]",), "a packed model has one quantizer for all of its weights"),
    ],
)
def test_wrong_arguments_are_named(kbit: Kbit, arguments: tuple[str, ...], message: str) -> None:
    done = kbit("bench", *arguments)
    assert done.code == 1
    assert message in done.err


def test_a_run_prints_time_and_memory(kbit: Kbit) -> None:
    only = ("eval.tasks=[]", "eval.perplexity=null", "eval.speed.measure=true", "packed=true")
    done = kbit("run", *only, *QUICK)
    assert done.code == 0, done.err
    assert "speed/batch_2" in done.out
    assert "ms_per_token" in done.out
    again = kbit("run", *only[:3], *QUICK)
    assert "ms_per_token" in again.out  # not packed: another experiment
    assert "0 to run" not in again.out
