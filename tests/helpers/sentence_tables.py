"""Checks the sentences of tables, maps and scatter plots."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats
from sentence_parts import LEAD, NUMBER, grade, list_budgets, weigh
from sentence_races import QUANTIZER, check_race, find_share, race


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
        name = better.replace("_", "-")
        found = re.search(rf"{name} minus {worse} ({NUMBER}) \((?:({NUMBER}) to ({NUMBER})|no interval)\)", verdict)
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
        values, curves = [], []
        for _, curve in rows.groupby([name for name in QUANTIZER if name in rows], dropna=False):
            curve = curve.sort_values("total_bits")
            if curve["total_bits"].nunique() > 1 and curve["total_bits"].min() <= row["total_bits"]:
                x = np.log(curve["total_bits"].to_numpy(dtype=float))
                values.append(float(np.interp(np.log(row["total_bits"]), x, curve["value"].to_numpy(dtype=float))))
                curves.append(curve)
        assert abs(row["value"] - (max(values) if metric == "acc" else min(values))) < 1e-9
        ties = sum(abs(value - row["value"]) <= 1e-9 for value in values)
        assert row["choice"].count(" = ") + 1 == ties
        if ties == 1 and "store" not in store.attrs:  # else items are drawn, together for all curves
            check_chance(row["chance"], curves, row["total_bits"], 1.0 if metric == "acc" else -1.0)


def check_chance(chance: float, curves: list[pd.DataFrame], budget: float, sign: float) -> None:
    """Draw each point from its own interval, and compare how often the best curve is best at the budget.

    Of two shares of 1,000 and 4,000 draws the difference has a standard error of at most 0.018.
    """
    rng, drawn, centres = np.random.default_rng(1), [], []
    for curve in curves:
        error = ((curve["high"] - curve["low"]) / (2 * 1.959964)).to_numpy(dtype=float)
        points = curve["value"].to_numpy(dtype=float) + error * rng.standard_normal((4000, len(curve)))
        x = np.log(curve["total_bits"].to_numpy(dtype=float))
        weights = np.stack([np.interp(np.log(budget), x, unit) for unit in np.eye(len(x))])
        drawn.append(sign * (np.where(weights == 0, 0.0, points) @ weights))
        centres.append(sign * curve["value"].to_numpy(dtype=float) @ weights)
    values = np.stack(drawn)
    if not np.isnan(values).any():
        assert abs(chance - (values.argmax(axis=0) == np.argmax(centres)).mean()) < 0.075


def check_laws(verdict: str, data: pd.DataFrame, store: pd.DataFrame) -> None:
    fitted = data[data["rmse"].notna()]
    wide = fitted.pivot(index=["family", "panel"], columns="law", values="rmse")
    wide = wide.reindex(columns=["power", "offset"]).dropna()
    assert verdict.startswith("Not tested") == wide.empty
    if len(wide):
        means = f"RMSE {wide['power'].mean():.4f} against {wide['offset'].mean():.4f} nats"
        assert verdict.startswith(f"In {(wide['power'] > wide['offset']).sum()} of {len(wide)} variants")
        assert means in verdict
    for row in fitted[fitted["law"].isin(["power", "offset"])].head(2).to_dict("records"):
        check_law(row, store)


def check_law(row: dict[Any, Any], store: pd.DataFrame) -> None:
    """Fit the law again, by scipy alone, and compare its error.

    The figure's weights are the spread of 1,000 draws of each point, which is 2% off its standard error.
    """
    rows = store[(store["metric"] == "cross_entropy") & store["key"].isin(row["keys"].split())]
    rows = rows.drop_duplicates("key")
    size, bits, y = (rows[name].to_numpy(dtype=float) for name in ("parameters", "bits", "value"))
    assert row["points"] == len(rows)
    error = ((rows["high"] - rows["low"]) / (2 * 1.959964)).to_numpy(dtype=float)
    scale = error if np.isfinite(error).all() and (error > 0).all() else np.full(len(y), y.std(ddof=1))
    own = sorted({*bits} - {16.0})

    def predict(p: Any) -> Any:
        if row["law"] == "power":
            return np.exp(p[0] - p[1] * np.log(size) - p[2] * np.log(bits))
        return np.exp(p[0] - p[1] * np.log(size)) + p[2] + np.stack([bits == k for k in own], axis=1) @ p[3:]

    def weigh_residuals(p: Any) -> Any:
        return (y - predict(p)) / scale

    starts = [[3.0 * p, p, *([p] if row["law"] == "power" else [y.min() / 2, *[0.0] * len(own)])] for p in (0.1, 0.5)]
    fits = [
        optimize.least_squares(weigh_residuals, start, loss="soft_l1", f_scale=2.0, x_scale="jac", max_nfev=4000)
        for start in starts
    ]
    best = min(fits, key=lambda fit: float(fit.cost))
    assert abs(row["rmse"] - np.sqrt(np.mean((y - predict(best.x)) ** 2))) < 0.03 * row["rmse"] + 1e-4


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
    for (model, quantizer), rows in data.groupby(["model", "quantizer"]):
        who, how = re.escape(str(model)), re.escape(str(quantizer))
        found = re.search(rf"(?:of|;) {who}: ([^;]+?) \(({NUMBER}), {how}\)", verdict)
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
