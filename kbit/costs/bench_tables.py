"""What `kbit bench` measured as tables: a row for each variant and batch, and the same for reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from kbit.costs.bench import Benched
from kbit.evaluation.speed.record import TASK, BatchRecord, name_batch
from kbit.evaluation.speed.timing import measure_median
from kbit.models.size import find_size
from kbit.numerics.spec import BASELINE_BITS
from kbit.store.rows import name_model


def tabulate_bench(benched: Iterable[Benched]) -> pd.DataFrame:
    """Return a row for each variant and batch.

    Columns: model, parameters, precision, bits, dtype, batch, ms_per_token with its 95% interval low and high,
    prompt_tokens_per_second, peak_megabytes, weight_megabytes (in memory), counted_megabytes, load_seconds, path (of a
    step), read_share (the weights that a step reads, by the bytes that the machine could read in its time), reason (why
    there is no time), the machine's gigaflops and gigabytes_per_second, conditions, and speedup with its 95% interval
    speedup_low and speedup_high: how many times as fast it is as the fastest plain variant at this batch (in 16 or 32
    bits), which is the median of the rounds' ratios.
    """
    table = pd.DataFrame([row for one in benched for row in _list_rows(one)])
    timed = table[(table["bits"] >= BASELINE_BITS) & table["ms_per_token"].notna()]
    plain = table.loc[timed.groupby(["model", "batch"])["ms_per_token"].idxmin()].set_index(["model", "batch"])[
        "rounds"
    ]
    gains = [_compare(plain.get((row["model"], row["batch"])), row["rounds"]) for row in table.to_dict("records")]
    return pd.concat([table.drop(columns="rounds"), pd.DataFrame(gains, table.index)], axis=1)


def _compare(plain: Sequence[float] | None, rounds: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, with its interval. All are NaN where one of both has no times."""
    if not plain or not rounds:
        return dict.fromkeys(("speedup", "speedup_low", "speedup_high"), math.nan)
    ratios = [base / own for base, own in zip(plain, rounds, strict=True)]
    found = measure_median(TASK, "speedup", ratios)
    return {"speedup": found.value, "speedup_low": found.low, "speedup_high": found.high}


def _list_rows(one: Benched) -> list[dict[str, Any]]:
    size = find_size(one.variant.model.name, one.variant.model.size)
    about: dict[str, Any] = {
        "model": name_model(one.variant.model), "parameters": size.parameters if size else None,
        "precision": one.variant.precision, "bits": one.variant.bits, "dtype": one.dtype,
    }  # fmt: skip
    record = one.record
    if record is None:
        return [about | {"reason": one.reason, "batch": None, "ms_per_token": math.nan, "rounds": ()}]
    numbers = {(m.task, m.metric): m for m in one.measurements}
    about |= {name: numbers[TASK, name].value for name in ("weight_megabytes", "load_seconds")}
    about["counted_megabytes"] = math.nan if record.counted_bytes is None else record.counted_bytes / 1e6
    about["gigaflops"] = numbers[TASK, "matmul_gigaflops"].value
    about["gigabytes_per_second"] = numbers[TASK, "read_gigabytes_per_second"].value
    about["conditions"] = record.describe_conditions()
    return [about | _describe_batch(one, batch) for batch in record.batches]


def _describe_batch(one: Benched, batch: BatchRecord) -> dict[str, Any]:
    numbers = {m.metric: m for m in one.measurements if m.task == name_batch(batch.batch)}
    row: dict[str, Any] = {"batch": batch.batch, "path": batch.step_path, "reason": batch.reason}
    row["rounds"] = one.rounds.get(batch.batch, ())
    row |= dict.fromkeys(("ms_per_token", "low", "high", "prompt_tokens_per_second", "read_share"), math.nan)
    row["peak_megabytes"] = math.nan if batch.peak_bytes is None else batch.peak_bytes / 1e6
    if "ms_per_token" in numbers:
        time = numbers["ms_per_token"]
        row |= {"ms_per_token": time.value, "low": time.low, "high": time.high}
        row["prompt_tokens_per_second"] = numbers["prompt_tokens_per_second"].value
        row["read_share"] = _find_read_share(one, time.value * batch.batch / 1e3)
    return row


def _find_read_share(one: Benched, step_seconds: float) -> float:
    """Return the weights that a step reads by what the machine could read in its time, or NaN where none is known."""
    record = one.record
    if record is None or record.read_bytes is None:
        return math.nan
    readable = step_seconds * 1e9 * sum(record.gigabytes_per_second) / len(record.gigabytes_per_second)
    return record.read_bytes / readable


def write_times(table: pd.DataFrame) -> pd.DataFrame:
    """Return milliseconds per token for reading: a row for each precision of a model, a column for each batch.

    In brackets stands how many times as fast it is as the fastest plain variant. The two are not told apart where the
    interval of the rounds' ratios holds 1. Where there is no time stands the reason.
    """
    cells = table.assign(cell=[_write_time(row) for row in table.to_dict("records")])
    missing = cells["batch"].isna()
    batches = sorted(cells.loc[~missing, "batch"].astype(int).unique())
    rows = []
    for (model, precision), group in cells.groupby(["model", "precision"], sort=False):
        by_batch = {int(row["batch"]): row["cell"] for row in group[group["batch"].notna()].to_dict("records")}
        first = group["cell"].iloc[0]
        rows.append({"model": model, "precision": precision} | {f"batch {b}": by_batch.get(b, first) for b in batches})
    return pd.DataFrame(rows)


def _write_time(row: dict[Any, Any]) -> str:
    if row["reason"]:
        return str(row["reason"])
    if math.isnan(row["speedup"]):
        return f"{row['ms_per_token']:.3g}"
    is_alike = row["speedup_low"] <= 1 <= row["speedup_high"] and row["speedup_low"] < row["speedup_high"]
    return f"{row['ms_per_token']:.3g} ({row['speedup']:.2f}x{', not told apart' if is_alike else ''})"


def write_costs(table: pd.DataFrame) -> pd.DataFrame:
    """Return memory, loading, prompt and reading of each variant for reading, at its smallest and largest batch."""
    rows = []
    for (model, precision), group in table[table["batch"].notna()].groupby(["model", "precision"], sort=False):
        first, fitting = group.iloc[0], group[group["reason"] == ""]
        row = {"model": model, "precision": precision, "weights MB": f"{first['weight_megabytes']:.4g}"}
        row["counted MB"] = _write(first["counted_megabytes"])
        row["peak MB"] = _write(fitting["peak_megabytes"].max())
        row["load s"] = _write(first["load_seconds"], 2)
        row["prompt tokens/s"] = _write(fitting["prompt_tokens_per_second"].max())
        row["reads"] = f"{100 * first['read_share']:.2g}%" if not math.isnan(first["read_share"]) else "-"
        row["path"] = str(first["path"])
        rows.append(row)
    return pd.DataFrame(rows)


def _write(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}g}"
