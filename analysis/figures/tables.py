"""The figures that are tables: the paper's tables 1 and 2, the verdicts, the frontier, and published anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy import stats

from kbit.analysis.curves.curves import (
    TIE,
    VARIANT,
    Measure,
    find_cross_entropy,
    find_measures,
    prefer_baseline,
)
from kbit.analysis.curves.families import find_curves, take_family
from kbit.analysis.curves.published import TOLERANCE, compare_anchors, read_published
from kbit.analysis.curves.selections import has_settings
from kbit.analysis.curves.settings import FLOATS, is_missing, name_block, name_quantizer, name_variant
from kbit.analysis.curves.units import format_bits
from kbit.analysis.figures.drawing import (
    LIMIT,
    MissingResults,
    PaperFigure,
    count_things,
    describe_lack,
    describe_sample,
    draw_table,
)
from kbit.analysis.statistics.frontier import choose_precision, draw_values, find_pareto_frontier, mean_interval
from kbit.analysis.statistics.grades import SIGN, describe_lead, describe_share, grade_interval
from kbit.analysis.statistics.verdicts import MOST_VARIANTS, NO_CONTEST, NOT_TRIED, TIED, name_range, tabulate_verdicts
from kbit.numerics.spec import BASELINE_BITS

TABLE_1: Final = (
    "With blocks, 2-bit GPTQ has a lower perplexity than 3-bit float at every block size (OPT-175B, WikiText-2)."
)

TABLE_2: Final = (
    "The standard deviation of a layer's weights, per hidden unit, predicts where the next layer's inputs are large: "
    "strongly from attention output to feed-forward, weakly from attention to its output, not in the control."
)

TABLE_2_METRIC: Final = "spearman_weight_std"  # measurements with this metric, task "proxy/<relation>"
BUDGET_STEPS: Final = 5  # budgets that the frontier lists of each family and measure, fewer if they fill a page
CHOICE: Final = ["bits", "label", "block_size"]  # what tells the curves of a family
SHOWN: Final = 28  # rows of a table that a page holds


def finish_table(
    name: str, data: pd.DataFrame, shown: pd.DataFrame, title: str, claim: str, verdict: str, *notes: str
) -> PaperFigure:
    """Draw a table of at most SHOWN rows. All rows are in the data and in the files of the table."""
    left = len(shown) - SHOWN
    more = f"{left} more rows are in the CSV." if left > 0 else ""
    kept = tuple(note for note in (*notes, more) if note)
    return PaperFigure(name, draw_table(shown.head(SHOWN), title), data, claim, verdict, kept, table=shown)


def table_1(results: pd.DataFrame) -> PaperFigure:
    """Compare the perplexity of 2-bit GPTQ and 3-bit float by block size, the paper's values beside ours.

    Raises:
        MissingResults: no model has both at one block size.
    """
    text = None if results.empty else find_cross_entropy(results)
    rows = pd.DataFrame() if text is None else find_curves(results, text.metric, text.task)
    if rows.empty or text is None:
        raise MissingResults(describe_lack("table_1", "a text's perplexity", ("nano/gptq", "paper/table_1")))
    rows = rows.iloc[rows.groupby("model")["total_bits"].transform("min").argsort(kind="stable")]  # by size
    is_gptq = (rows["method"] == "gptq") & (rows["bits"] == 2)
    is_float = (rows["data_type"] == "float") & ~has_settings(rows) & (rows["bits"] == 3)
    pick = ["model", "block_size", "value", "key"]
    gptq = rows[is_gptq][[*pick, "label"]].rename(columns={"label": "gptq"})
    both = gptq.merge(rows[is_float][pick], on=["model", "block_size"], suffixes=("_gptq", "_float"))
    if both.empty:
        needs = "2-bit GPTQ and 3-bit float of one model at the same block sizes"
        raise MissingResults(describe_lack("table_1", needs, ("nano/gptq", "paper/table_1")))
    data = both.assign(gptq_2bit=np.exp(both["value_gptq"]), float_3bit=np.exp(both["value_float"]), text=text.task)
    data = data[["model", "text", "block_size", "gptq", "gptq_2bit", "float_3bit"]]
    paper = read_published("table_1").assign(model="opt-175b (paper)", text="wikitext2", gptq="")
    data = pd.concat([data, paper[[*data.columns, "source"]]], ignore_index=True)
    verdict = judge_pairs(both, rows, text, results)
    shown = pd.DataFrame(
        {
            "model": data["model"],
            "text": data["text"],
            "block size": data["block_size"].astype(object).where(data["block_size"].notna(), "whole tensor"),
            "GPTQ's quantizer": data["gptq"].replace("", "-"),
            "2-bit GPTQ": data["gptq_2bit"].map("{:.2f}".format),
            "3-bit float": data["float_3bit"].map("{:.2f}".format),
        }
    )
    return finish_table("table_1", data, shown, "Perplexity of 2-bit GPTQ and 3-bit float", TABLE_1, verdict)


def judge_pairs(both: pd.DataFrame, rows: pd.DataFrame, text: Measure, results: pd.DataFrame) -> str:
    """Return whether the first of each pair is better on average: the mean lead with its interval.

    Args:
        both: a row per pair, whose key_gptq and key_float name its experiments.
        rows: points of all curves, see curves.precision_curves.
        text: the measure, a loss.
        results: the table behind the points, see frontier.draw_values.
    """
    points = rows.drop_duplicates("key").set_index("key", drop=False).loc[[*both["key_gptq"], *both["key_float"]]]
    weights = np.repeat([-1 / len(both), 1 / len(both)], len(both))
    draws = draw_values(points, text, results)
    low, high = mean_interval(draws, weights)
    lead = describe_lead(float(points["value"].to_numpy(dtype=np.float64) @ weights), low, high, text)
    wins = int((both["value_gptq"] < both["value_float"]).sum())
    grade = grade_interval(low, high).capitalize()
    pairs = f"it is lower in {wins} of {len(both)} pairs ({draws.source})"
    return f"{grade}: the mean lead of 2-bit GPTQ over 3-bit float is {lead}; {pairs}."


def table_2(results: pd.DataFrame) -> PaperFigure:
    """Show the Spearman correlation of weight deviation and outlier magnitude, the paper's values beside ours.

    Raises:
        MissingResults: it was not measured.
    """
    rows = results[results["metric"] == TABLE_2_METRIC] if len(results) else results
    if rows.empty:
        needs = f"measurements of {TABLE_2_METRIC} (weight deviation against the size of the next layer's inputs)"
        raise MissingResults(describe_lack("table_2", needs, ("nano/features", "paper/table_2")))
    rows = prefer_baseline(rows).sort_values("parameters", kind="stable")
    ours = rows.assign(relation=rows["task"].str.removeprefix("proxy/"), spearman=rows["value"], source="this store")
    columns = ["relation", "model", "spearman", "source"]
    paper = read_published("table_2")
    paper = paper.assign(model=paper["model"] + " (paper)")
    data = pd.concat([ours[columns], paper], ignore_index=True)
    verdict = judge_order(ours.pivot_table(index="model", columns="relation", values="spearman"))
    wide = data.pivot_table(index="model", columns="relation", values="spearman", sort=False).reset_index()
    wide = wide.set_axis([str(name).replace("_", "-") for name in wide], axis=1)
    wide = pd.concat([wide[["model"]], wide.drop(columns="model").map("{:.2f}".format).replace("nan", "-")], axis=1)
    families = ", ".join(sorted(rows["family"].unique()))
    counts = f"{count_things(rows['key'].nunique(), 'experiment')} on {count_things(rows['model'].nunique(), 'model')}"
    sample = f"Data: {counts} of {families}."
    return finish_table("table_2", data, wide, "Spearman correlation", TABLE_2, verdict, sample)


def judge_order(correlations: pd.DataFrame) -> str:
    """Return whether the proxy is better before feed-forward layers than in attention, and there than in the control.

    Args:
        correlations: a table with index model and the relations as columns. A difference is taken within each model,
            and the models are the sample of its 95% t-interval.
    """
    order = correlations.reindex(columns=["feed_forward", "attention", "control"]).dropna()
    if order.empty:
        return "Not tested: no model has all three correlations."
    grades, parts = [], []
    for better, worse in pairwise(order):
        gaps = (order[better] - order[worse]).to_numpy(dtype=np.float64)
        low, high = np.nan, np.nan
        if len(gaps) > 1:
            low, high = map(float, stats.ttest_1samp(gaps, 0).confidence_interval(0.95))
        grades.append(grade_interval(low, high))
        interval = "no interval" if np.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        parts.append(f"{better} minus {worse} {gaps.mean():+.2f} ({interval})".replace("_", "-"))
    grade = next(g for g in ("does not hold", "undecided", "holds") if g in grades)
    mean = f"mean over {len(order)} models with 95% t-interval" if len(order) > 1 else "of 1 model"
    return f"{grade.capitalize()}: {', '.join(parts)}, {mean}."


def draw_verdicts(results: pd.DataFrame) -> PaperFigure:
    """Show for every family, variant and measure which precision is optimal, by how much and how surely.

    Raises:
        MissingResults: no variant has two precisions that meet.
    """
    table = pd.DataFrame() if results.empty else tabulate_verdicts(results)
    if table.empty or table["bits"].isna().all():
        needs = "two precisions, each at two or more sizes of one family"
        raise MissingResults(describe_lack("verdicts", needs, ("nano/bit_level", "paper/figure_2")))
    claim = "Which precision is optimal at equal total bits, by how much, and does 4-bit, as the paper has it?"
    grades = table["four_bit"].value_counts()
    tested = ", ".join(f"{grade} in {count}" for grade, count in grades.items())
    tried = table[table["bits"].notna()]
    winners = tried["bits"].value_counts()
    leader = ", ".join(f"{bits}-bit in {count}" for bits, count in winners.items())
    verdict = (
        f"Best over the largest share of the budgets: {leader} of {len(tried)} variants (data type, block size, "
        f"method, outliers) by measure. The claim for 4 bits: {tested}."
    )
    left, untried, tied = (int((table["grade"] == why).sum()) for why in (NO_CONTEST, NOT_TRIED, TIED))
    data, table = table, table.groupby(["family", "measure"], sort=False).head(MOST_VARIANTS)
    more = ""
    if len(data) > len(table):
        more = f"Table: of each family and measure the {MOST_VARIANTS} variants with the most points; the CSV has "
        more += f"{len(data) - len(table)} more."
    alone = f"Not counted: {left} with one quantized precision, which met 16 bits alone." if left else ""
    alone += f" Not tried: {untried} more variants; --where chooses." if untried else ""
    alone += f" Tied: {tied}, in which no precision is ever the best." if tied else ""
    sources = sorted(set(table["source"].dropna()) - {""})
    note = f" Uncertainty: {'; '.join(sources)}." if sources else ""
    measures = [measure for family, measure in list_family_measures(results) if family in set(tried["family"])]
    floats = FLOATS if (tried["data_type"] == "float").any() else ""
    notes = [SIGN + note, more, alone, floats, describe_sample(results, tried["keys"], *dict.fromkeys(measures)), LIMIT]
    return finish_table("verdicts", data, show_verdicts(table), "k-bit is optimal: which k?", claim, verdict, *notes)


def show_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of tabulate_verdicts as they are read."""
    return pd.DataFrame(
        {
            "family": table["family"],
            "variant": [name_variant(*pair) for pair in zip(table["data_type"], table["block_size"], strict=True)],
            "measure": table["measure"],
            "bits compared": table["precisions"],
            "budgets": [name_range(*ends) for ends in zip(table["lowest"], table["highest"], strict=True)],
            "best": [show(bits, "{}-bit".format) for bits in table["bits"]],
            "of budgets": [show(share, describe_share) for share in table["share"]],
            "mean lead (95% interval)": [show_lead(row) for row in table.to_dict("records")],
            "P(best)": table["chance"].map(show_chance),
            "grade": table["grade"],
            "claim for 4-bit": [show(grade, str) for grade in table["four_bit"]],
        }
    )


def show(cell: Any, words: Callable[[Any], str]) -> str:
    """Return a cell in words, or "-" where it is missing."""
    return "-" if is_missing(cell) else words(cell)


def show_lead(row: Mapping[Any, Any]) -> str:
    """Return the lead of a row of tabulate_verdicts, for example "+0.0100 (+0.0050 to +0.0150) over 3-bit"."""
    if is_missing(row["rival"]):
        return "-"
    interval = "no interval" if np.isnan(row["low"]) else f"{row['low']:+.4f} to {row['high']:+.4f}"
    return f"{row['gap']:+.4f} ({interval}) over {row['rival']}-bit"


def show_chance(chance: float) -> str:
    """Return for example "97%", or "?" where a value without an interval leaves it unknown."""
    return "?" if np.isnan(chance) else describe_share(chance)


def draw_frontier(results: pd.DataFrame) -> PaperFigure:
    """Show, for budgets across the range of each family, the best model to have and the probability that it is.

    All curves of the family compete, whatever their precision, data type, block size, method, outliers or settings.

    Raises:
        MissingResults: no measure was taken at two sizes.
    """
    pairs = list_family_measures(results)
    steps = min(BUDGET_STEPS, max(1, SHOWN // max(1, len(pairs))))
    known: dict[Measure, pd.DataFrame | None] = {}
    fields = [(family, measure, find_rivals(results, family, measure, known)) for family, measure in pairs]
    parts = [tabulate_frontier(curves, family, measure, steps, results) for family, measure, curves in fields]
    data = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if data.empty:
        needs = "mean zero-shot accuracy or cross entropy at two sizes of one family"
        raise MissingResults(describe_lack("frontier", needs, ("nano/bit_level", "paper/figure_2")))
    claim = "For a budget of bits, which precision, data type, block size and method is best, how surely?"
    sure = int(((data["chance"] >= 0.95) & ~data["choice"].str.contains(" = ", regex=False)).sum())
    verdict = f"At {sure} of {len(data)} budgets one choice is best with 95% or more."
    shown = pd.DataFrame(
        {
            "family": data["family"],
            "measure": data["measure"],
            "budget": data["total_bits"].map(format_bits),
            "best": data["choice"],
            "value": data["value"].map("{:.3f}".format),
            "P(best)": data["chance"].map(show_chance),
            "likeliest rival": data["next"] + " (" + data["next_chance"].map(show_chance) + ")",
        }
    )
    note = (
        "P(best): among all curves that reach the budget; neighbours of one data type share it. Rival: of the others, "
    )
    note += "the one that is most probably best. Choices joined by = have equal values."
    used = [key for (_, _, curves), part in zip(fields, parts, strict=True) if len(part) for key in curves["key"]]
    measures = dict.fromkeys(measure for (_, measure, _), part in zip(fields, parts, strict=True) if len(part))
    notes = [note, describe_sample(results, used, *measures), LIMIT]
    return finish_table("frontier", data, shown, "The best choice for a budget of bits", claim, verdict, *notes)


def list_family_measures(results: pd.DataFrame) -> list[tuple[str, Measure]]:
    """Return every family with each measure it has."""
    if results.empty:
        return []
    families = results[["family", "metric", "task"]].groupby("family")  # a group copies its columns
    return [(str(family), measure) for family, rows in families for measure in find_measures(rows)]


def find_rivals(
    results: pd.DataFrame, family: str, measure: Measure, known: dict[Measure, pd.DataFrame | None]
) -> pd.DataFrame:
    """Return the points of a family's curves of two sizes or more: those that compete for a budget.

    The arguments are those of take_family.

    Raises:
        AmbiguousResults: see precision_curves.
    """
    curves = take_family(results, family, measure, known)
    sizes = curves.groupby([*VARIANT, "bits"], dropna=False)["model"].transform("nunique")
    return curves[sizes >= 2].reset_index(drop=True)


def tabulate_frontier(
    curves: pd.DataFrame, family: str, measure: Measure, steps: int, results: pd.DataFrame
) -> pd.DataFrame:
    """Return family, measure, total_bits, choice, value, low, high, chance, next, next_chance for one family.

    Args:
        curves: from find_rivals.
        family: the curves' family.
        measure: the measure by which a choice is the best.
        steps: the number of budgets, evenly spaced in their logarithm inside the range of the frontier, or of all
            curves where only one curve reaches the frontier's range.
        results: the table behind the curves, see frontier.draw_values.
    """
    if curves.empty:
        return pd.DataFrame()
    frontier = find_pareto_frontier(curves, measure.higher_is_better)
    first, last = frontier["total_bits"].min(), frontier["total_bits"].max()
    starts = curves.groupby([*VARIANT, "bits"], dropna=False)["total_bits"].min().drop_duplicates().nsmallest(2)
    if last <= starts.max():  # one of the smallest models beats all others: no second curve reaches such budgets
        last = curves["total_bits"].max()
    budgets = np.geomspace(first, last, steps + 2)[1:-1]
    name_choice = find_choices(curves)
    rows = []
    for budget, choices in choose_precision(curves, measure, budgets.tolist(), results).groupby("total_bits"):
        if len(choices) < 2:
            continue
        compared = list(zip(*(choices[name].astype(str) for name in CHOICE), strict=True))
        first = choices.iloc[0]
        is_best = ((choices["value"] - first["value"]).abs() <= TIE).to_numpy()  # equal values are all shown
        others = np.flatnonzero(~is_best)
        rival = {"next": "-", "next_chance": np.nan}
        if others.size:
            rival = {"next": name_choice(compared[others[0]]), "next_chance": choices["chance"].iloc[others[0]]}
        choice = " = ".join(name_choice(choice) for choice, best in zip(compared, is_best, strict=True) if best)
        rows.append(
            {"family": family, "measure": measure.name, "total_bits": budget, "choice": choice}
            | {name: first[name] for name in ("value", "low", "high")}
            | {"chance": choices.loc[is_best, "chance"].sum(skipna=False)}
            | rival
        )
    return pd.DataFrame(rows)


def find_choices(curves: pd.DataFrame) -> Callable[[tuple[str, ...]], str]:
    """Return the function that names a curve, "nf4 block 64" or "16-bit", by what CHOICE tells of it, as texts."""
    first = curves.drop_duplicates(CHOICE)
    places = {key: place for place, key in enumerate(zip(*(first[name].astype(str) for name in CHOICE), strict=True))}

    def name_choice(choice: tuple[str, ...]) -> str:
        (row,) = first.iloc[[places[choice]]].to_dict("records")
        is_plain = row["bits"] == BASELINE_BITS
        return "16-bit" if is_plain else f"{name_quantizer(row)} {name_block(row['block_size'])}"

    return name_choice


def draw_anchors(results: pd.DataFrame) -> PaperFigure:
    """Compare our 16-bit values with published ones of the same models: is the evaluation itself right?

    Raises:
        MissingResults: no model here has published values.
    """
    data = pd.DataFrame() if results.empty else compare_anchors(results)
    if data.empty:
        needs = "a 16-bit model whose accuracies are published (OPT, BLOOM, Pythia) on all items of the paper's tasks"
        raise MissingResults(describe_lack("anchors", needs, ("paper/figure_2",)))
    claim = "Do the unquantized models score what others published for them?"
    verdict = f"{int(data['agrees'].sum())} of {len(data)} values agree with the published ones to {TOLERANCE:g} "
    largest = data.loc[data.groupby("metric")["difference"].transform(lambda part: part.abs() == part.abs().max())]
    named = largest.drop_duplicates("metric")[["metric", "difference", "model", "task"]].to_numpy()
    parts = [f"{metric} {gap:+.3f} ({model}, {task})" for metric, gap, model, task in named]
    verdict += f"(perplexities: to {TOLERANCE:.1%}); the largest differences: {', '.join(parts)}."
    numbers = data[["value", "low", "high", "published", "difference"]].map("{:.3f}".format)
    shown = pd.concat([data[["model", "task", "metric"]], numbers, data[["agrees"]]], axis=1)
    return finish_table("anchors", data, shown, "Ours and published", claim, verdict)
