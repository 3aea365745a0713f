"""Checks sentences about the best precision at equal total bits."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import numpy as np
import pandas as pd
from sentence_parts import (
    LEAD,
    SHARE,
    check_counts,
    check_lead,
    check_share,
    count_grades,
    grade,
    list_budgets,
    list_curves,
    read_bits,
    weigh,
)

QUANTIZER: Final = (
    "bits", "data_type", "block_size", "exponent_bits", "method", "outlier_fraction", "outlier_selection",
    "scale_format", "exclude",
)  # fmt: skip


def race(points: pd.DataFrame, sign: float) -> pd.DataFrame:
    """Return a table of values at shared budgets, a column per precision, where larger is better."""
    curves = list_curves(points, "bits")
    budgets = list_budgets(curves.values())
    values = {bits: weigh(c, budgets).to_numpy() @ c["value"].to_numpy(dtype=float) for bits, c in curves.items()}
    return sign * pd.DataFrame(values, index=budgets)


def find_share(table: pd.DataFrame, bits: int) -> float:
    """Return the share of the budgets where a precision is better than each other one."""
    others = table.drop(columns=bits).max(axis=1)
    return float(((table[bits] - others) > 1e-9).mean())


def check_four_bit(verdict: str, data: pd.DataFrame) -> None:
    """Check the sentences of verdicts.judge_four_bit."""
    sign = 1.0 if data["metric"].iloc[0] == "acc" else -1.0
    panels = {str(panel): points for panel, points in data.groupby("panel")}
    tables = {panel: race(points, sign) for panel, points in panels.items()}
    if verdict.startswith("Not tested: "):
        there = any(4 in list_curves(points, "bits") for points in panels.values())
        assert there == ("meets another" in verdict)
        assert not any(4 in table and len(table) for table in tables.values())
        return
    allowed = []
    for panel, points in panels.items():
        alone = rf"rival, (?P<rival>\d+)-bit, is {LEAD}\. It is best over {SHARE}.* Budgets: (?P<ends>.+)\.$"
        among = rf"[:;] {re.escape(panel)}: [a-z ]+, {LEAD} over (?P<rival>\d+)-bit, best over {SHARE} of the budgets, "
        found = re.search(alone if len(panels) == 1 else among + r"(?P<ends>.+?\)(?= \(|;))", verdict)
        if found is not None:
            rival = int(found["rival"])
            words = re.search(LEAD, found[0])
            assert words is not None
            check_race(words.groups(), points, tables[panel], rival, sign)
            check_share(str(re.search(rf"best over {SHARE}", found[0])[1]), find_share(tables[panel], 4))  # type: ignore[index]
            ends = [read_bits(end) for end in re.findall(r"(\S+ \w*bit) \(", found["ends"])]
            assert np.allclose(ends, tables[panel].index[[0, -1]], rtol=6e-3)
            allowed.append(grade(words[2], words[3], "better", 0))
    head = Counter([verdict.split(":")[0].lower()]) if len(panels) == 1 else count_grades(verdict)
    assert sum(head.values()) == len(panels)
    if "; and " not in verdict:
        check_counts(head, allowed)
    if len(panels) == 1:
        check_elsewhere(verdict, next(iter(tables.values())))


def check_race(words: Any, points: pd.DataFrame, table: pd.DataFrame, rival: int, sign: float, own: int = 4) -> None:
    """Compare a printed lead of one precision over its strongest rival with our own, and that with all others."""
    curves = list_curves(points, "bits")
    leads: dict[int, float] = {}
    ends: dict[int, float] = {}
    for other in {int(bits) for bits in table.columns} - {own}:
        met = (table[own] - table[other]).notna().to_numpy()
        budgets = table.index.to_numpy()[met]
        if not budgets.size:
            continue
        total = pd.Series(0.0, points.index)
        for bits, factor in ((own, sign), (other, -sign)):
            total = total.add(factor * weigh(curves[bits], budgets).mean(), fill_value=0.0)
        errors = total * (points["high"] - points["low"]) / (2 * 1.959964)
        error = float(np.sqrt((errors[total != 0] ** 2).sum(skipna=False)))
        lead = float((total * points["value"]).sum())
        if other == rival:
            named = (lead, error)
        leads[other] = lead
        ends[other] = lead - (0 if np.isnan(error) else 1.96 * error)
    assert abs(float(words[0]) - named[0]) < 6e-5
    if words[1]:
        check_lead(words, *named, strongest=True)
        assert ends[rival] <= min(ends.values()) + named[1] / 2 or named[0] < 0
    else:
        assert named[0] <= min(leads.values()) + 1e-9


def check_elsewhere(verdict: str, table: pd.DataFrame) -> None:
    """Check which precisions are best where 4-bit is not: "(else 3-bit or 8-bit, level with the best over 5%)"."""
    others = table.drop(columns=4)
    lead = table[4] - others.max(axis=1)
    better = set(others[lead < -1e-9].idxmax(axis=1)) if (lead < -1e-9).any() else set()
    found = re.search(r"shared budgets(?: \((.*?)\))?\.", verdict)
    assert found is not None
    named = re.search(r"else (.+?)(?:,|$)", found[1] or "")
    assert {int(bits) for bits in re.findall(r"(\d+)-bit", named[1] if named else "")} == better
    level = re.search(rf"level with the best over {SHARE}", found[1] or "")
    share = float((lead.abs() <= 1e-9).mean())
    assert (level is None) == (share == 0)
    if level:
        check_share(level[1], share)


def list_variants(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of each variant of one family and measure, with the baseline's among them."""
    usual = rows["bits"].map({2: 1, 3: 2}).fillna(3).astype(int)
    own = rows["exponent_bits"].astype("Int64")
    rows = rows.assign(exponent_bits=own.mask((own == usual) & (rows["data_type"] == "float")))
    base, quantized = rows[rows["bits"] == 16], rows[rows["bits"] < 16]
    names = [name for name in QUANTIZER if name in rows and name != "bits"]
    parts = [part for _, part in quantized.groupby(names, dropna=False)] or [base.head(0)]
    return [pd.concat([part, base], ignore_index=True) for part in parts]


def check_finding(text: str, store: pd.DataFrame) -> None:
    """Check the sentences of findings.finding: which precision is best, over which share, in how many variants."""
    assert not re.search(r"(?<!\w)[+-]?nan\b|<NA>", text)
    families = sorted(store["family"].unique())
    starts = [text.index(family) for family in families]
    for family, start, end in zip(families, starts, [*starts[1:], len(text)], strict=True):
        for name, metric, task in (
            ("mean zero-shot accuracy", "acc", "mean_zero_shot"),
            ("cross entropy", "cross_entropy", "text"),
        ):
            rows = store[(store["family"] == family) & (store["metric"] == metric) & (store["task"] == task)]
            check_clause(text[start:end], name, rows, 1.0 if metric == "acc" else -1.0)


def check_clause(text: str, measure: str, rows: pd.DataFrame, sign: float) -> None:
    """Check what a family's sentence says of one measure."""
    tables = [race(part, sign) for part in list_variants(rows)]
    contests = [table for table in tables if sum(int(str(bits)) < 16 for bits in table) > 1]
    shares = [{int(str(b)): find_share(table, int(str(b))) for b in table} for table in contests if len(table)]
    if single := re.search(rf"(\d+)-bit is best over {SHARE} of the budgets by {measure}", text):
        assert len(contests) == 1
        check_share(single[2], shares[0][int(single[1])])
        assert shares[0][int(single[1])] == max(shares[0].values())
    if several := re.search(rf"most often best by {measure} (?:is|are) (.+?) in (\d+) of (\d+) variants", text):
        assert int(several[3]) == len(contests)
        wins: Counter[str] = Counter()
        for share in shares:
            best = [
                f"{bits}-bit" for bits, part in share.items() if part == max(*share.values(), 1 - sum(share.values()))
            ]
            wins[best[0] if len(best) == 1 and sum(share.values()) > 0 else "tied"] += 1
        assert {name for name, count in wins.items() if count == max(wins.values())} == set(several[1].split(" and "))
        assert int(several[2]) == max(wins.values())
