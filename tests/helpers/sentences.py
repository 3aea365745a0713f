"""Computes what a figure's sentences claim again, from the data drawn and the store, and compares.

Nothing here uses the analysis: curves are interpolated by numpy, intervals follow from the errors of independent
points, and correlations are scipy's. Of intervals by resampling a third of a standard error is chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Floats = npt.NDArray[np.float64]
Check = Callable[[str, pd.DataFrame, pd.DataFrame], None]  # verdict, data drawn, the store

NUMBER: Final = r"[+-]\d+\.\d+"
LEAD: Final = rf"({NUMBER})(?: nats)? \((?:95% interval ({NUMBER}) to ({NUMBER})|no interval)\)"
SHARE: Final = r"(more than 99%|less than 1%|\d+%)"
UNITS: Final = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
NAMED: Final = 6  # panels that a sentence names
QUANTIZER: Final = (
    "bits", "data_type", "block_size", "exponent_bits", "method", "outlier_fraction", "outlier_selection",
    "scale_format", "exclude",
)  # fmt: skip
NEGLIGIBLE: Final = {"acc": 0.005, "cross_entropy": 0.01}
EXPECTED: Final = {
    "figure_7": "no better", "figure_8": "better", "figure_9": "better", "figure_10": "no better",
    "figure_11": "no better", "figure_12": "best", "figure_14": "best", "figure_15": "better", "methods": "better",
}  # fmt: skip
KINDS: Final[dict[str, Callable[[pd.DataFrame], Any]]] = {
    "5-bit": lambda d: d["bits"] == 5,
    "4-bit": lambda d: d["bits"] == 4,
    "quantile": lambda d: d["data_type"] == "quantile",
    "another data type": lambda d: d["data_type"] != "quantile",
    "quantile or float": lambda d: d["data_type"].isin(["quantile", "float"]),
    "int or dynamic": lambda d: d["data_type"].isin(["int", "dynamic"]),
    "half of the bits as exponent bits": lambda d: d["series"] == ("E" + ((d["bits"] + 1) // 2).astype(str)),
    "another number of exponent bits": lambda d: d["series"] != ("E" + ((d["bits"] + 1) // 2).astype(str)),
    "small blocks": lambda d: d["series"].str.startswith("block"),
    "GPTQ": lambda d: d["series"].str.contains("gptq"),
    "GPTQ with its default options": lambda d: d["series"] == "gptq",
    "rounding to nearest": lambda d: d["series"] == "rtn",
    "float in blocks of 64": lambda d: d["series"] == "float block 64",
    "outliers in 16 bit": lambda d: d["series"].str.contains("outliers"),
    "the same precision without": lambda d: ~d["series"].str.contains("with"),
    "4-bit without": lambda d: d["series"] == "4-bit",
}


def read_bits(text: str) -> float:
    """Return the number behind "20 Mbit"."""
    number, unit = text.split()
    return float(number) * UNITS[unit]


def list_curves(points: pd.DataFrame, by: str) -> dict[Any, pd.DataFrame]:
    """Return the curves of two sizes or more, each sorted by size."""
    curves = {name: rows.sort_values("total_bits", kind="stable") for name, rows in points.groupby(by)}
    return {name: rows for name, rows in curves.items() if rows["total_bits"].nunique() > 1}


def list_budgets(curves: Iterable[pd.DataFrame]) -> Floats:
    """Return 200 budgets that all quantized curves reach, or all curves if one alone is quantized. Perhaps none."""
    curves = list(curves)
    quantized = [rows for rows in curves if (rows["bits"] < 16).any()]
    compared = quantized if len(quantized) > 1 else curves
    if len(compared) < 2:
        return np.empty(0)
    low, high = max(c["total_bits"].min() for c in compared), min(c["total_bits"].max() for c in compared)
    if low >= high:
        return np.empty(0)
    budgets = np.exp(np.linspace(np.log(low), np.log(high), 200))
    budgets[[0, -1]] = low, high  # not a rounding error outside
    return np.asarray(budgets, dtype=np.float64)


def weigh(curve: pd.DataFrame, budgets: Floats) -> pd.DataFrame:
    """Return the weight of each point (column) in the curve's value at each budget (row)."""
    x = np.log(curve["total_bits"].to_numpy(dtype=float))
    rows = [np.interp(np.log(budgets), x, unit, left=np.nan, right=np.nan) for unit in np.eye(len(x))]
    return pd.DataFrame(np.stack(rows, axis=1), columns=curve.index)


def find_lead(points: pd.DataFrame, first: list[str], second: list[str], sign: float) -> tuple[float, float] | None:
    """Return the mean lead of some curves over others with its standard error, or None if they do not meet."""
    kept = points[points["series"].isin([*first, *second])]
    curves = list_curves(kept, "series")
    budgets = list_budgets(curves.values())
    if not budgets.size or not {*first} & {*curves} or not {*second} & {*curves}:
        return None
    total = pd.Series(0.0, kept.index)
    for names, factor in ((first, sign), (second, -sign)):
        named = [name for name in names if name in curves]
        for name in named:
            total = total.add(factor / len(named) * weigh(curves[name], budgets).mean(), fill_value=0.0)
    error = (kept["high"] - kept["low"]) / (2 * 1.959964)
    return float((total * kept["value"]).sum()), float(np.sqrt(((total * error) ** 2).sum(skipna=False)))


def check_lead(words: tuple[str, ...], lead: float, error: float, *, strongest: bool = False) -> None:
    """Compare a printed lead and its interval with our own. That over the strongest of several is wider."""
    assert abs(float(words[0]) - lead) < 6e-5
    assert (not words[1]) == bool(np.isnan(error))
    if words[1]:
        low, high = float(words[1]), float(words[2])
        slack = error / 3 + 6e-5
        assert abs(low - (lead - 1.96 * error)) < slack
        assert high > lead + 1.96 * error - slack
        assert strongest or high < lead + 1.96 * error + slack


def grade(low: str, high: str, expected: str, limit: float) -> set[str]:
    """Return the grades that an interval allows, several where rounding decides. Without one it is undecided."""
    if not low:
        return {"undecided"}
    a, b = float(low), float(high)
    if expected == "level":
        a, b = min(a + limit, limit - b), max(-abs(limit), min(b + limit, limit - a))
    elif expected == "worse":
        a, b = -b, -a
    elif expected == "no better":
        a, b = limit - b, limit - a
    near = {"holds", "does not hold", "undecided"} if min(abs(a), abs(b)) < 1.1e-4 else set()
    return near | {"holds" if a > 0 else "does not hold" if b < 0 else "undecided"}


def check_contrasts(verdict: str, data: pd.DataFrame, expected: str) -> None:
    """Check the sentences of claims.judge_contrasts: leads, intervals, budgets, counts of grades, or why none."""
    sign = 1.0 if data["metric"].iloc[0] == "acc" else -1.0
    panels = {str(panel): points for panel, points in data.groupby("panel", sort=False)}
    if "Not tested: " in verdict:
        check_untested(verdict, panels)
        return
    allowed: list[set[str]] = []
    for panel, points in panels.items():
        found = re.search(rf"(?:: |; ){re.escape(panel)}, (.+?) over (.+?): {LEAD}, (.+?) to (.+?)(?:;| \()", verdict)
        if found is None:
            continue
        first, second = found[1].split(" and "), found[2].split(" and ")
        lead = find_lead(points, first, second, sign)
        assert lead is not None
        check_lead(found.groups()[2:5], *lead, strongest=expected == "best")
        allowed.append(grade(found[4], found[5], expected, NEGLIGIBLE[data["metric"].iloc[0]]))
        budgets = list_budgets(list_curves(points[points["series"].isin([*first, *second])], "series").values())
        assert [read_bits(found[6]), read_bits(found[7])] == [
            *np.round([budgets[0], budgets[-1]], 0).tolist()
        ] or np.allclose([read_bits(found[6]), read_bits(found[7])], [budgets[0], budgets[-1]], rtol=6e-3)
        if expected == "best":
            check_strongest(points, first, second[0], lead, sign)
    more = re.search(r"; and (\d+) more", verdict)
    counts = count_grades(verdict)
    tested = len(allowed) + (int(more[1]) if more else 0)
    assert tested == sum(counts.values()) - counts["not tested"]
    assert sum(counts.values()) == len(panels)
    if not more:
        check_counts(counts, allowed)


def check_strongest(points: pd.DataFrame, first: list[str], named: str, lead: tuple[float, float], sign: float) -> None:
    """No curve of the panel is a stronger rival than the one named, by its lead's lower end."""
    ends = {}
    for rival in set(points["series"]) - set(first):
        other = find_lead(points, first, [rival], sign)
        if other is not None:
            ends[rival] = other[0] - (0 if np.isnan(other[1]) else 1.96 * other[1])
    own = lead[0] - (0 if np.isnan(lead[1]) else 1.96 * lead[1])
    slack = 1e-9 if np.isnan(lead[1]) else lead[1] / 2
    assert named in ends
    assert own <= min(ends.values()) + slack or lead[0] < 0


def check_untested(verdict: str, panels: dict[str, pd.DataFrame]) -> None:
    """Check why no panel allows a comparison: no such curve, none beside the other, or no shared budget."""
    if absent := re.search(r"there is no curve of (.+?)\.", verdict):
        for kind in absent[1].split(" and none of "):
            if kind == "larger blocks":
                counts = [list_curves(points, "series") for points in panels.values()]
                assert all(sum(name.startswith("block") for name in curves) < 2 for curves in counts)
                continue
            assert not any(list_curves(points[KINDS[kind](points)], "series") for points in panels.values()), kind
        return
    both = re.search(r"(?:no panel has curves of|in no panel do curves of) (.+) and (.+?)(?: meet|\.)", verdict)
    assert both is not None
    there = [
        [list_curves(points[KINDS[kind](points)], "series") for kind in both.groups()] for points in panels.values()
    ]
    meeting = [first and second for first, second in there]
    assert bool(any(meeting)) == ("in no panel do" in verdict)


def count_grades(verdict: str) -> Counter[str]:
    """Return the grades that a sentence counts: "Of 3 panels: holds in 2, undecided in 1", or a single one."""
    head = verdict.split(". ")[0].split(" (")[0]
    if not head.startswith("Of "):
        return Counter([head.split(":")[0].lower()])
    parts = re.findall(r"(holds|does not hold|undecided|not tested) in (\d+)", head.lower())
    return Counter({name: int(count) for name, count in parts})


def check_counts(counts: Counter[str], allowed: list[set[str]]) -> None:
    """Compare counted grades with the grades that each panel's interval allows."""
    for name in ("holds", "does not hold", "undecided"):
        sure = sum(grades == {name} for grades in allowed)
        assert sure <= counts[name] <= sum(name in grades for grades in allowed), (name, counts, allowed)


def check_share(words: str, share: float) -> None:
    """Compare a printed share with our own, where all and none are exact."""
    if words == "more than 99%":
        assert 0.99 < share < 1
    elif words == "less than 1%":
        assert 0 < share < 0.01
    else:
        assert abs(int(words[:-1]) / 100 - share) < 0.0051
        assert (words == "100%") == (share == 1)
        assert (words == "0%") == (share == 0)


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


def check_table(name: str, verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    """Check the sentence of a figure that has no curves."""
    TABLES[name](verdict, data, store)


def check_figure_3(verdict: str, data: pd.DataFrame) -> None:
    """Check both sentences of figure 3."""
    blocks, _, types = verdict.partition("Data type: ")
    is_block = data["series"].str.match("block |whole tensor")
    if blocks:
        check_contrasts(blocks.removeprefix("Block size: "), data[is_block], "better")
    if types:
        check_contrasts(types, data[~is_block], "better")
    assert (bool(blocks), bool(types)) == (bool(is_block.any()), bool((~is_block).any()))


def check_figure_4(verdict: str, data: pd.DataFrame) -> None:
    """Check the sentences of figure 4 but for those of controls."""
    is_three = data.groupby("panel")["bits"].transform("min") == 3
    for what, sentence in re.findall(r"\[(.+?)\] (.+?)(?= \[|$)", verdict):
        if "dimensions" not in what:
            expected = "worse" if "behind" in what else "no better" if "nothing" in what else "better"
            check_contrasts(sentence, data[is_three if what.startswith("3") else ~is_three], expected)


def check_figure_5(verdict: str, data: pd.DataFrame) -> None:
    """Check a sentence for each panel of figure 5."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])(?!Mean)", verdict)
    panels = list(data.groupby("panel", sort=False))
    assert len(sentences) == len(panels)
    for sentence, (_, points) in zip(sentences, panels, strict=True):
        check_contrasts(sentence, points, "worse" if (points["bits"] == 3).all() else "level")


def check_table_1(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    ours = data[data["model"] != "opt-175b (paper)"]
    gaps = np.log(ours["float_3bit"] / ours["gptq_2bit"])
    found = re.search(LEAD, verdict)
    assert found is not None
    assert abs(float(found[1]) - gaps.mean()) < 6e-5
    assert f"lower in {(gaps > 0).sum()} of {len(ours)} pairs" in verdict
    assert verdict.split(":")[0].lower() in grade(found[2], found[3], "better", 0)


def check_table_2(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    ours = data[data["source"] == "this store"].pivot(index="model", columns="relation", values="spearman")
    ours = ours.reindex(columns=["feed_forward", "attention", "control"]).dropna()
    assert verdict.startswith("Not tested") == ours.empty
    for better, worse in (("feed_forward", "attention"), ("attention", "control")) if len(ours) else ():
        gaps = ours[better] - ours[worse]
        found = re.search(rf"{better} less {worse} ({NUMBER}) \((?:({NUMBER}) to ({NUMBER})|no interval)\)", verdict)
        assert found is not None
        assert abs(float(found[1]) - gaps.mean()) < 0.0051
        if len(gaps) > 1 and found[2]:
            half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5
            assert abs(float(found[3]) - gaps.mean() - half) < 0.0051
    assert ours.empty or f"{len(ours)} model" in verdict


def check_verdicts(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    tried = data[data["bits"].notna()]
    said = dict(re.findall(r"(\d+)-bit in (\d+)", verdict))
    assert {int(bits): int(count) for bits, count in said.items()} == tried["bits"].value_counts().to_dict()
    assert f"of {len(tried)} variants" in verdict
    claims = verdict.split("The claim for 4 bits: ")[1]
    grades = {name: int(count) for name, count in re.findall(r"([a-z ]+?) in (\d+)", claims.replace(", ", ","))}
    assert grades == data["four_bit"].value_counts().to_dict()
    for row in tried.head(3).to_dict("records"):
        metric = "acc" if "accuracy" in row["measure"] else "cross_entropy"
        task = {"acc": "mean_zero_shot", "cross_entropy": "text"}[metric]
        rows = store[(store["metric"] == metric) & (store["task"] == task) & store["key"].isin(row["keys"].split())]
        sign = 1.0 if metric == "acc" else -1.0
        table = race(rows, sign)
        shares = {int(str(bits)): find_share(table, int(str(bits))) for bits in table}
        assert abs(shares[row["bits"]] - row["share"]) < 1e-9
        assert row["share"] == max(shares.values())
        words = (f"{row['gap']:+.9f}", *(["", ""] if np.isnan(row["low"]) else [f"{row['low']}", f"{row['high']}"]))
        check_race(words, rows, table, row["rival"], sign, own=row["bits"])
        assert row["grade"] in grade(words[1], words[2], "better", 0)


def check_frontier(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    sure = ((data["chance"] >= 0.95) & ~data["choice"].str.contains(" = ")).sum()
    assert verdict == f"At {sure} of {len(data)} budgets one choice is best with 95% or more."
    for row in data.head(4).to_dict("records"):
        metric = "acc" if "accuracy" in row["measure"] else "cross_entropy"
        task = {"acc": "mean_zero_shot", "cross_entropy": "text"}[metric]
        rows = store[(store["family"] == row["family"]) & (store["metric"] == metric) & (store["task"] == task)]
        values = []
        for _, curve in rows.groupby([name for name in QUANTIZER if name in rows], dropna=False):
            curve = curve.sort_values("total_bits")
            if curve["total_bits"].nunique() > 1 and curve["total_bits"].min() <= row["total_bits"]:
                x = np.log(curve["total_bits"].to_numpy(dtype=float))
                values.append(float(np.interp(np.log(row["total_bits"]), x, curve["value"].to_numpy(dtype=float))))
        assert abs(row["value"] - (max(values) if metric == "acc" else min(values))) < 1e-9
        ties = sum(abs(value - row["value"]) <= 1e-9 for value in values)
        assert row["choice"].count(" = ") + 1 == ties


def check_laws(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    wide = data.pivot(index="family", columns="law", values="rmse").reindex(columns=["power", "offset"]).dropna()
    assert verdict.startswith("Not tested") == wide.empty
    if len(wide):
        means = f"RMSE {wide['power'].mean():.4f} against {wide['offset'].mean():.4f} nats"
        assert verdict.startswith(f"In {(wide['power'] > wide['offset']).sum()} of {len(wide)} families")
        assert means in verdict


def check_map(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    is_accuracy = "accuracy" in data["measure"].iloc[0]
    metric, task = ("acc", "mean_zero_shot") if is_accuracy else ("cross_entropy", "text")
    sign = 1.0 if is_accuracy else -1.0
    rows = store[(store["metric"] == metric) & (store["task"] == task)].drop_duplicates("key").set_index("key")
    for panel, cells in data.groupby("panel"):
        curves = [rows.loc[keys.split()].sort_values("total_bits") for keys in cells["keys"]]
        budgets = list_budgets(curves)
        values = [sign * weigh(c.reset_index(), budgets).to_numpy() @ c["value"].to_numpy(dtype=float) for c in curves]
        table = np.stack(values)
        lost = (table.max(axis=0) - table).mean(axis=1)
        assert np.allclose(lost, cells["loss"], atol=1e-9)
        blocks = ["whole tensor" if pd.isna(b) else f"block {b}" for b in cells["block_size"]]
        names = [f"{kind} {block} [" for kind, block in zip(cells["data_type"], blocks, strict=True)]
        best = {name for name, loss in zip(names, lost, strict=True) if loss <= lost.min() + 1e-9}
        words = rf"best (?:is|are) (.+?)(?:, its lead over (.+?\[.+?\]) {LEAD}|, which)"
        found = re.search(rf"{re.escape(str(panel))}: {words}", verdict)
        assert found is not None
        assert {f"{name.split('[')[0]}[" for name in found[1].split(" and ")} == best
        if found[2]:
            second = np.sort(lost)[1]
            assert abs(float(found[3]) - second + lost.min()) < 6e-5
            assert f"{found[2].split('[')[0]}[" in names


def check_relation(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    rank = verdict.startswith("rho")
    correlate: Any = stats.spearmanr if rank else stats.pearsonr
    number = r"(-?\d\.\d\d)"
    found = re.match(rf"(?:rho|r) = {number} \(95% interval {number} to {number}, .*?over (\d+) exp", verdict)
    assert found is not None
    assert abs(float(found[1]) - correlate(data["x"], data["y"]).statistic) < 0.0051
    assert int(found[4]) == len(data) == data["key"].nunique()
    if "the paper's" in verdict:
        inside = float(found[2]) - 0.005 <= -0.94 <= float(found[3]) + 0.005
        assert inside or "outside" in verdict
    own = [
        correlate(group["x"], group["y"]).statistic
        for _, group in data.groupby("model")
        if len(group) >= 4 and group["x"].nunique() > 1 and group["y"].nunique() > 1
    ]
    said = re.findall(r"-?\d\.\d\d", verdict.partition("Within one model:")[2])
    expected = [] if not own else own if len(own) == 1 else [min(own), max(own)]
    assert np.allclose([float(number) for number in said], expected, atol=0.0051)


def check_sensitivity(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    for model, rows in data.groupby("model"):
        found = re.search(rf"(?:of|;) {re.escape(str(model))}: (.+?) \(({NUMBER}), ", verdict)
        assert found is not None
        assert set(found[1].split(" and ")) == set(rows.loc[rows["loss"] >= rows["loss"].max() - 1e-9, "part"])
        assert abs(float(found[2]) - rows["loss"].max()) < 5.1e-4
        base = store[(store["model"] == model) & (store["bits"] == 16)]
        own = store[store["key"].isin(rows["key"])]
        measure = own[own["metric"].isin(["acc", "cross_entropy"])]["metric"].iloc[-1]
        assert base["metric"].eq(measure).any()


def check_int8(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    ours = data[data["source"] == "this store"].set_index(["method", "model"])
    methods = ours.index.get_level_values("method")
    there = {"llm_int8", "absmax"} <= {*methods}
    both = set(ours.loc["llm_int8"].index) & set(ours.loc["absmax"].index) if there else set()
    assert verdict.startswith("Not tested") == (not both)
    if both:
        for name, part in zip(("llm_int8", "absmax"), verdict.split("; absmax adds"), strict=True):
            added = ours.loc[name].loc[sorted(both), "added"]
            assert f"({added.min():+.4f} to {added.max():+.4f} nats)" in part
        if len(both) > 1:
            assert verdict.startswith(f"Of {len(both)} models")


def check_features(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    ours = data[data["source"] == "this store"]
    known = ours[ours["features"].notna()]
    assert f"{(known['features'] > 0).sum()} of {len(known)} model" in verdict
    if "of layers" in verdict:
        assert f"up to {ours['layers'].max():.0%} of layers, at up to {ours['positions'].max():.1%}" in verdict
    found = re.search(rf"adds ({NUMBER}) nats on average(?:, as many random dimensions ({NUMBER}))?", verdict)
    if found:
        some = known[known["features"] > 0].dropna(subset=["perplexity", "loss_without", "top1", "top1_without"])
        some = some.dropna(subset=["loss_without_random", "top1_without_random"]) if found[2] else some
        assert abs(float(found[1]) - (some["loss_without"] - np.log(some["perplexity"])).mean()) < 5.1e-4


def check_anchors(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    limit = np.where(data["metric"] == "perplexity", 0.005 * data["published"], 0.005)
    agree = ((data["value"] - data["published"]).abs() <= limit).sum()
    assert verdict.startswith(f"{agree} of {len(data)} values agree")
    for metric, rows in data.groupby("metric"):
        found = re.search(rf"{metric} ({NUMBER}) \((.+?), (.+?)\)", verdict)
        assert found is not None
        gaps = (rows["value"] - rows["published"]).abs()
        assert abs(abs(float(found[1])) - gaps.max()) < 5.1e-4
        assert found[2] in set(rows["model"])


def check_roofline(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    at = data[(data["batch"] == 16) & (data["bits"] == 4)].set_index("device")["speedup"]
    for device, gain in at.items():
        assert f"{device} {gain:.2f}" in verdict
    assert verdict.startswith("Holds") == bool(at.min() > 3.5)


TABLES: Final[dict[str, Check]] = {
    "table_1": check_table_1,
    "table_2": check_table_2,
    "verdicts": check_verdicts,
    "frontier": check_frontier,
    "laws": check_laws,
    "data_types_map": check_map,
    **dict.fromkeys(("perplexity_accuracy", "kl_accuracy", "error_accuracy", "error_loss"), check_relation),
    "sensitivity": check_sensitivity,
    "int8_methods": check_int8,
    "features": check_features,
    "anchors": check_anchors,
    "figure_16": check_roofline,
}
CURVES: Final[dict[str, Callable[[str, pd.DataFrame], None]]] = {
    **dict.fromkeys(("figure_1", "figure_2", "figure_13"), check_four_bit),
    "figure_3": check_figure_3,
    "figure_4": check_figure_4,
    "outliers": check_figure_4,
    "figure_5": check_figure_5,
}


def check_sentences(name: str, verdict: str, caption: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    """Check the verdict of one figure, and how much data its caption says it rests on."""
    assert not re.search(r"(?<!\w)[+-]?nan\b|<NA>|None", verdict), verdict
    if name in TABLES:
        TABLES[name](verdict, data, store)
    elif name in CURVES:
        CURVES[name](verdict, data)
    else:
        check_contrasts(verdict, data, EXPECTED[name])
    if name in TABLES:
        return
    keys = {key for group in data["key"] for key in group.split()}
    assert f"Data: {len(keys)} experiment" in caption
    assert f" on {data['model'].nunique()} model" in caption
    metric, task = data["metric"].iloc[0], data["task"].iloc[0]
    measured = store[(store["metric"] == metric) & (store["task"] == task) & store["family"].isin(data["family"])]
    left = measured["key"].nunique() - len(keys)
    assert (f"Left out: {left} experiment" in caption) == (left > 0)


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
