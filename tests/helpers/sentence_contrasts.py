"""Checks sentences that compare two groups of curves, panel by panel."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pandas as pd
from sentence_parts import (
    LEAD,
    NEGLIGIBLE,
    check_counts,
    check_lead,
    count_grades,
    find_lead,
    grade,
    list_budgets,
    list_curves,
    read_bits,
)


def is_largest_block(d: pd.DataFrame) -> Any:
    """Whether a point is of the largest of two or more blocks, of those from 64 to 1024 if they are as many."""
    sizes = sorted(int(name.split()[1]) for name in list_curves(d, "series") if name.startswith("block "))
    within = [size for size in sizes if 64 <= size <= 1024]
    ends = within if len(within) >= 2 else sizes
    return d["series"] == (f"block {ends[-1]}" if len(ends) >= 2 else None)


KINDS: Final[dict[str, Callable[[pd.DataFrame], Any]]] = {
    "larger blocks": is_largest_block,
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
    "GPTQ with its default or its only options": lambda d: d["series"] == "gptq",
    "rounding to nearest": lambda d: d["series"] == "rtn",
    "float in blocks of 64": lambda d: d["series"].str.match(r"float\d-e\dm\d block 64"),
    "outliers in 16 bit": lambda d: d["series"].str.contains("outliers"),
    "the same precision without": lambda d: ~d["series"].str.contains("with"),
    "outliers by proxy": lambda d: d["series"].str.contains(r"with \S+% outliers$"),
    "random dimensions": lambda d: d["series"].str.contains(r"with \S+% random$"),
    "4-bit without": lambda d: d["series"] == "4-bit",
}


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
    """Check the sentences of figure 4. Those of controls speak of the panels that have one."""
    is_three = data.groupby("panel")["bits"].transform("min") == 3
    for what, sentence in re.findall(r"\[(.+?)\] (.+?)(?= \[|$)", verdict):
        if selection := re.search(r"than (\w+) dimensions", what):
            has_control = data.loc[data["series"].str.endswith(f"% {selection[1]}"), "panel"]
            check_contrasts(sentence, data[data["panel"].isin(has_control)], "better")
        else:
            expected = "worse" if "behind" in what else "no better" if "nothing" in what else "better"
            check_contrasts(sentence, data[is_three if what.startswith("3") else ~is_three], expected)


def check_figure_5(verdict: str, data: pd.DataFrame) -> None:
    """Check a sentence for each panel of figure 5."""
    sentences = re.findall(r"\[(\d)-bit: GPTQ (\w+)\] (.+?)(?= \[|$)", verdict)
    panels = list(data.groupby("panel", sort=False))
    assert len(sentences) == len(panels)
    for (bits, expected, sentence), (_, points) in zip(sentences, panels, strict=True):
        assert set(points["bits"]) == {int(bits)}
        assert expected == ("worse" if bits == "3" else "level")
        check_contrasts(sentence, points, expected)
