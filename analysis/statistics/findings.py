"""What the results say about the best precision at equal total bits, in plain sentences."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from kbit.analysis.curves.curves import (
    VARIANT,
    ZERO_SHOT,
    AmbiguousResults,
    Measure,
    best_precision,
    find_cross_entropy,
    is_contest,
    optimal_share,
    precision_curves,
    sort_curves,
    split_families,
    split_variants,
)
from kbit.analysis.curves.run_time import leave_out_rounded
from kbit.analysis.curves.settings import is_missing, name_variant
from kbit.analysis.curves.trainings import leave_out_trained
from kbit.analysis.statistics.grades import describe_lead, describe_share
from kbit.analysis.statistics.verdicts import line_up, try_precision


def finding(results: pd.DataFrame) -> str:
    """Return what the results say about the best precision at equal bits, a plain sentence per family."""
    if results.empty:
        return "No results yet."
    untrained = leave_out_trained(results)
    if untrained.empty:
        return "Every model was trained: `kbit figures qat qlora optimizer_ablation states training_curves` shows them."
    results = split_families(leave_out_rounded(untrained))
    if results.empty:
        return "Only inputs or caches were rounded: `kbit figures activations_map cache_bits` shows what that adds."
    families = sorted(results["family"].unique())
    return " ".join(describe_family(results[results["family"] == family], str(family)) for family in families)


def describe_family(results: pd.DataFrame, family: str) -> str:
    """Return one family's sentence: its best precision by accuracy and by cross entropy, or why none."""
    reason = explain_too_few(results)
    if reason:
        return f"{family}: the best precision at equal total bits {reason}."
    try:
        clauses, variants = describe_measures(results)
    except AmbiguousResults as error:
        return f"{family}: {error}."
    if not variants:
        return f"{family}: neither mean zero-shot accuracy nor cross entropy was measured."
    scope = variants[0] if len(variants) == 1 else f"{len(variants)} variants (data type, block size, method, outliers)"
    return f"{family}, {scope}, at equal total bits: {'; '.join(clauses)}."


def describe_measures(results: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return a clause per measure of one family, and the names of the variants measured."""
    clauses: list[str] = []
    variants: set[str] = set()
    for label, measure in ((ZERO_SHOT.name, ZERO_SHOT), ("cross entropy", find_cross_entropy(results))):
        curves = None if measure is None else precision_curves(results, measure.metric, measure.task)
        if measure is None or curves is None or curves.empty:
            clauses.append(f"{label} was not measured")
            continue
        parts = list(split_variants(curves))
        contests = [part for part in parts if is_contest(sort_curves(part[1]))] or parts
        variants.update(name_variant(v["label"], v["block_size"]) for v, _ in contests)
        compared = pd.concat([group for _, group in contests], ignore_index=True)
        left = len(parts) - len(contests)
        alone = f" ({left} more have one quantized precision: no contest)" if left else ""
        clauses.append(describe_curves(compared, measure, results) + alone)
    return clauses, sorted(variants)


def describe_curves(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame) -> str:
    """Return the clause for one family and measure: the best precision, over which share of budgets, how surely."""
    shares = optimal_share(best_precision(curves, measure.higher_is_better))
    if shares.empty or not any(is_contest(sort_curves(group)) for _, group in split_variants(curves)):
        reason = explain_too_few(curves) or "needs two quantized precisions that overlap, each at two sizes or more"
        return f"the best precision by {measure.name} {reason}"
    variants = sum(1 for _ in split_variants(curves))
    if variants == 1:
        leader = shares["bits"].iloc[0]
        sure = "" if is_missing(leader) else describe_certainty(curves, measure, results, int(leader))
        return describe_shares(shares, measure) + sure
    counts = count_winners(shares)
    leaders = [name_bits(bits) for bits, count in counts.items() if count == max(counts.values())]
    others = [f"{name_bits(bits)} in {count}" for bits, count in counts.items() if name_bits(bits) not in leaders]
    rest = f" ({', '.join(others)})" if others else ""
    verb, each = ("is", "") if len(leaders) == 1 else ("are", " each")
    return (
        f"most often best by {measure.name} {verb} {' and '.join(leaders)} in {max(counts.values())} of {variants} "
        f"variants{each}{rest}"
    )


def count_winners(shares: pd.DataFrame) -> dict[int | None, int]:
    """Return in how many variants each precision has the largest share of the budgets, the most frequent first.

    None stands for a variant in which no precision has: a tie has, or two precisions have as much.
    """
    counts: Counter[int | None] = Counter()
    for _, of_variant in shares.groupby(VARIANT, dropna=False):
        best = of_variant.loc[of_variant["share"] == of_variant["share"].max(), "bits"]
        counts[None if len(best) > 1 or is_missing(best.iloc[0]) else int(best.iloc[0])] += 1
    return dict(counts.most_common())


def describe_shares(shares: pd.DataFrame, measure: Measure) -> str:
    """Return for example "4-bit is best over 71% of the budgets by cross entropy (3-bit 29%)"."""
    (leader, share), *others = list(zip(shares["bits"], shares["share"], strict=True))
    verdict = "the precisions tie" if is_missing(leader) else f"{name_bits(leader)} is best"
    rest = ", ".join(f"{name_bits(bits)} {describe_share(part)}" for bits, part in others)
    return f"{verdict} over {describe_share(share)} of the budgets by {measure.name}" + (f" ({rest})" if rest else "")


def describe_certainty(curves: pd.DataFrame, measure: Measure, results: pd.DataFrame, bits: int) -> str:
    """Return the verdict on "this precision is optimal" with its mean lead, as a clause."""
    trial = try_precision(line_up(curves, measure, results), bits)
    return (
        f": {trial.grade}, mean lead over {trial.rival}-bit {describe_lead(trial.gap, trial.low, trial.high, measure)}"
    )


def name_bits(bits: object) -> str:
    """Return "4-bit", or "tied" for NA."""
    return "tied" if is_missing(bits) else f"{bits}-bit"


def explain_too_few(rows: pd.DataFrame) -> str | None:
    """Return "needs at least two model sizes (has ... only)", or the same for precisions, or None if neither."""
    for column, what, unit in (("model", "model sizes", ""), ("bits", "precisions", "-bit")):
        found = rows[column].unique()
        if len(found) < 2:
            return f"needs at least two {what} (has {found[0]}{unit} only)"
    return None
