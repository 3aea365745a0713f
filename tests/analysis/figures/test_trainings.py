"""Figures of trained models: what is computed from known losses, and what other figures make of such rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kbit.analysis.curves.curves import AmbiguousResults, find_cross_entropy
from kbit.analysis.curves.trainings import (
    CONTROL,
    GPTQ,
    PTQ,
    QAT,
    QLORA,
    describe_seeds,
    leave_out_trained,
    name_way,
    read_fields,
)
from kbit.analysis.figures.canvas.page import OWN_PAGE
from kbit.analysis.figures.drawing import MissingResults
from kbit.analysis.figures.registry import FIGURES, TRAINED, draw_figure
from kbit.analysis.figures.training import training_curves
from kbit.analysis.figures.training.qat import describe_recovery, judge_qat, list_leads, tabulate_qat
from kbit.analysis.figures.training.qlora import judge_qlora, summarize, tabulate_qlora
from kbit.analysis.statistics.findings import finding

SIZES = {"small": 1_000_000, "large": 4_000_000}  # parameters
QAT_FIELDS: dict[str, Any] = {"steps": 300, "text": "t"}


def make_row(
    model: str, bits: int, value: float, fields: dict[str, Any] | None = None, task: str = "text", **more: Any
) -> dict[str, Any]:
    """A row of read_results."""
    fields = fields or {}
    words = {name: part for name, part in fields.items() if name != "seed"}
    key = f"{model}-{bits}-{json.dumps(fields)}-{sorted(more.items())}"
    row = {"key": key, "model": model, "family": "f", "architecture": "A", "parameters": SIZES[model], "bits": bits}
    row |= {"total_bits": SIZES[model] * bits, "bits_per_param": bits + 0.25, "task": task, "metric": "cross_entropy"}
    row |= {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9, "evaluation": "e", "seed": 0}
    row |= {"training": json.dumps(words) if fields else None, "train_seed": fields.get("seed", 0) if fields else None}
    row |= {"train_fields": json.dumps(fields) if fields else None, "exponent_bits": None, "block_size": None}
    quantized = {"data_type": "nf", "block_size": 64, "method": "rtn", "scale_format": "fp16"} if bits != 16 else {}
    return row | {"data_type": None, "method": None, "scale_format": None} | quantized | more


def make_study(shift: float) -> pd.DataFrame:
    """Two models at 3, 4 and 16 bits, rounded, trained for it with two seeds, and the control.

    After rounding 3 bits lose .2 and 4 bits .05, and after training .02 and .01. The second seed loses more at 3.
    """
    rows = []
    for model, whole in (("small", 3.0), ("large", 2.5)):
        rows += [make_row(model, 16, whole), make_row(model, 3, whole + 0.2), make_row(model, 4, whole + 0.05)]
        for seed in (0, 1):
            seeded = QAT_FIELDS | ({"seed": seed} if seed else {})
            rows.append(make_row(model, 16, whole + 0.01, seeded))
            rows.append(make_row(model, 3, whole + 0.19, seeded))
            for bits, lost in ((3, 0.02 + shift * seed), (4, 0.01)):
                rows.append(make_row(model, bits, whole + lost, seeded | {"weights": {"bits": bits}}))
    return pd.DataFrame(rows)


def test_ways_are_told_by_fields() -> None:
    assert [name_way(read_fields(cell)) for cell in (None, np.nan, '{"steps": 3}', '{"steps": 3, "weights": {}}')] == [
        PTQ, PTQ, CONTROL, QAT,
    ]  # fmt: skip
    for method in ("gptq", "awq", "hqq"):
        assert name_way(QAT_FIELDS | {"weights": {"bits": 3}}, method) is None
    assert (name_way({}, "gptq"), name_way({}, "awq"), name_way(QAT_FIELDS | {"lora": {}})) == (GPTQ, None, QLORA)
    others: list[dict[str, Any]] = [{"lora": {}, "momentum": {}}, {"start": "random"}, {"momentum": {}}]
    for other in (*others, {"weights": {}, "activations": {}}):
        assert name_way(QAT_FIELDS | other) is None


def test_seeds_have_students_interval() -> None:
    mean, low, high = describe_seeds(pd.Series([1.0, 2.0, 3.0]))
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-5)
    assert np.isnan(describe_seeds(pd.Series([1.0]))[1])


def test_a_lead_is_that_at_the_large_models_lower_bits() -> None:
    data = tabulate_qat(make_study(shift=0.0))
    [lead] = list_leads(data)
    assert (lead.lower, lead.upper, lead.budget) == (3, 4, 12_000_000)
    # the 4-bit line runs from 4 to 16 Mbit, of which 12 is at log 3 / log 4
    at = math.log(3) / math.log(4)
    assert lead.rounded == pytest.approx((2.5 + 0.2) - (3.05 + at * (2.55 - 3.05)))
    assert lead.trained.tolist() == pytest.approx([(2.5 + 0.02) - (3.01 + at * (2.51 - 3.01))] * 2)


NO_CONTROL = "Beside rounding alone, without a control that trained as long"


def test_the_verdict_says_whether_the_optimum_moves() -> None:
    """Interpolation lets 4 bits lose .5 (1 - log 3 / log 4) = .104 to 3 bits, beside what rounding takes."""
    flipped = judge_qat(tabulate_qat(make_study(shift=0.0)))
    assert flipped.startswith(f"{NO_CONTROL}: training moves the optimal precision: fewer bits become better at equal")
    assert "f at 12 Mbit: 4 bits lead 3 by +0.046 nats when rounded, and by -0.094 (-0.094 to -0.094)" in flipped
    assert (
        "at 3 bits trained for it (QAT) 95%, trained, then rounded 10%; at 4 bits trained for it (QAT) 100%." in flipped
    )
    unsure = judge_qat(tabulate_qat(make_study(shift=0.2)))
    assert unsure.startswith("These trainings do not show that the optimal precision moves.")
    one = make_study(shift=0.0)
    assert "(one seed)" in judge_qat(tabulate_qat(one[one["train_seed"] != 1]))


@pytest.mark.parametrize(
    ("more", "spread", "words"),
    [(0.102, 0.0005, "the optimal one stays"), (0.095, 0.002, "seeds do not tell which is best now")],
)
def test_a_lead_that_shrinks_may_stay(more: float, spread: float, words: str) -> None:
    """With .098 more at 3 bits than in make_study 4 bits would lead by .004."""
    study = make_study(shift=0.0)
    is_aware = study["train_fields"].str.contains("weights", na=False) & (study["bits"] == 3)
    moved = study["value"] + is_aware * (more + spread * (study["train_seed"] == 1))
    verdict = judge_qat(tabulate_qat(study.assign(value=moved)))
    assert verdict.startswith(f"{NO_CONTROL}: training moves precisions together, and {words}: more bits lead by less")


def test_what_the_control_does_as_well_is_not_the_roundings_doing() -> None:
    """The control leads by as little as the training for few bits, or by as much as rounding: + .05 - (- .09)."""
    for at_3, at_4, head in ((0.02, 0.01, "These trainings do not show"), (0.2, 0.05, "Training moves the optimal")):
        rows = []
        for model, whole in (("small", 3.0), ("large", 2.5)):
            for seed in (0, 1):
                seeded = QAT_FIELDS | ({"seed": seed} if seed else {})
                rows += [make_row(model, bits, whole + lost, seeded) for bits, lost in ((3, at_3), (4, at_4))]
        study = make_study(shift=0.0)
        known = (
            study["training"].notna() & (study["bits"] == 3) & ~study["train_fields"].str.contains("weights", na=False)
        )
        verdict = judge_qat(tabulate_qat(pd.concat([study[~known], pd.DataFrame(rows)])))
        assert verdict.startswith(head)
        lead = "-0.094 (-0.094 to -0.094)" if at_3 == 0.02 else "+0.046 (+0.046 to +0.046)"
        assert f"Trained, then rounded, they lead by {lead}" in verdict


def test_qat_is_of_one_quantizer_and_of_models_that_have_both() -> None:
    study = make_study(shift=0.0)
    extra = pd.DataFrame([make_row("large", 3, 9.0, data_type="int"), make_row("small", 3, 9.0, block_size=128)])
    table = tabulate_qat(pd.concat([study, extra]))
    assert table["value"].max() < 9
    assert sorted(set(table["way"])) == sorted({PTQ, QAT, CONTROL})
    faster = make_row("large", 3, 9.0, QAT_FIELDS | {"lr": 0.1, "weights": {"bits": 3}})
    assert tabulate_qat(pd.concat([study, pd.DataFrame([faster])])).equals(tabulate_qat(study))
    assert tabulate_qat(leave_out_trained(study)).empty


def test_gptq_and_adapters_are_panels_of_their_own() -> None:
    lora = QAT_FIELDS | {"lora": {"rank": 2}}
    rows = [make_row("small", 3, 3.1, method="gptq"), make_row("small", 3, 3.05, lora)]
    bits = make_row("small", 3, 3.05, lora) | {"task": "training", "metric": "adapter_bits", "value": 7000.0}
    table = tabulate_qat(pd.concat([make_study(shift=0.0), pd.DataFrame([*rows, bits])])).set_index("way")
    assert table.loc[[GPTQ], "value"].tolist() == [3.1, 3.0, 2.5]  # and the checkpoints at 16 bits
    assert list(table.loc[QLORA, ["value", "total_bits"]]) == [3.05, 3_007_000]


def test_other_figures_and_findings_leave_trained_models_out() -> None:
    study = make_study(shift=0.0)
    plain = leave_out_trained(study)
    assert plain["training"].isna().all()
    assert len(plain) == 6
    assert finding(study) == finding(plain)
    for name in ("figure_13", "frontier", "error_loss"):
        try:
            expected = draw_figure(name, plain).data
        except ValueError as error:
            with pytest.raises(type(error)):
                draw_figure(name, study)
            continue
        pd.testing.assert_frame_equal(draw_figure(name, study).data, expected)
    assert set(TRAINED) <= set(FIGURES)


def test_the_measured_text_is_no_trainings() -> None:
    rows = [make_row("small", bits, 1.0, {"steps": 1, "text": "t"}, task="training/unseen") for bits in (3, 4)]
    measure = find_cross_entropy(pd.DataFrame([make_row("small", 16, 1.0), *rows]))
    assert measure is not None
    assert measure.task == "text"


@pytest.mark.parametrize("name", TRAINED)
def test_a_figure_says_what_it_lacks(name: str) -> None:
    with pytest.raises(MissingResults, match="run: kbit run \\+sweeps=nano/"):
        draw_figure(name, pd.DataFrame([make_row("small", 16, 1.0), make_row("small", 3, 1.1)]))


def test_qat_is_drawn() -> None:
    figure = draw_figure("qat", make_study(shift=0.01), OWN_PAGE)
    assert len(figure.fig.axes) == 3
    assert "Student's 95% intervals over seeds" in figure.notes[0]


def test_qat_of_whole_tensors_is_found() -> None:
    study = make_study(shift=0.0)
    whole = tabulate_qat(study.assign(block_size=None))
    assert whole["value"].tolist() == tabulate_qat(study)["value"].tolist()


def test_gptq_is_of_its_most_frequent_options() -> None:
    rows = [
        make_row(model, bits, 3.1, method="gptq", method_options=options)
        for model, bits, options in (
            ("small", 3, "desc_act=True"),
            ("small", 3, ""),
            ("large", 3, ""),
            ("large", 4, ""),
        )
    ]
    rows[0]["value"] = 9.0
    table = tabulate_qat(pd.concat([make_study(shift=0.0), pd.DataFrame(rows)]))
    assert table.loc[(table["way"] == GPTQ) & (table["bits"] < 16), "value"].tolist() == [3.1, 3.1, 3.1]


def test_what_nothing_won_back_is_said() -> None:
    study = make_study(shift=0.0)
    trained = study[(study["bits"] != 16) | study["training"].notna()]
    assert describe_recovery(tabulate_qat(trained)).startswith("No model shows what rounding loses")


def end(row: dict[str, Any], *, diverged: bool, steps: float = 9.0) -> list[dict[str, Any]]:
    """The rows of how a training ended."""
    numbers = {"diverged": float(diverged), "loss_spikes": 0.0, "steps": steps}
    return [row | {"task": "training", "metric": name, "value": value} for name, value in numbers.items()]


def test_diverged_trainings_are_counted() -> None:
    """Seed 2 of 3 bits diverged, so that the fewest seeds are two and not three."""
    extra = [make_row("small", 4, 3.01, QAT_FIELDS | {"seed": 2, "weights": {"bits": 4}})]
    lost = make_row("small", 3, 0.0, QAT_FIELDS | {"seed": 2, "weights": {"bits": 3}})
    figure = draw_figure("qat", pd.concat([make_study(0.01), pd.DataFrame([*extra, *end(lost, diverged=True)])]))
    assert "2 seeds of each training at least. 1 experiment more diverged in training." in figure.notes[-1]


# ---- adapters


def make_adapters() -> pd.DataFrame:
    """One model beside 16 bits, nf4 and int4, two seeds: nf4 costs .01 +- 0, and int4 .02 and .04."""
    rows = [make_row("small", 16, 3.0), make_row("small", 4, 3.1), make_row("small", 4, 3.3, data_type="int")]
    for seed, cost in ((0, 0.02), (1, 0.04)):
        lora = {"steps": 9, "text": "t", "lora": {"rank": 2}} | ({"seed": seed} if seed else {})
        rows.append(make_row("small", 16, 2.9 + seed, lora))
        rows.append(make_row("small", 4, 2.91 + seed, lora))
        rows.append(make_row("small", 4, 2.9 + seed + cost, lora, data_type="int"))
    return pd.DataFrame(rows)


def test_differences_to_16_bits_are_paired_by_seed() -> None:
    summary = summarize(tabulate_qlora(make_adapters())).set_index("base")
    assert summary["mean"].to_dict() == pytest.approx({"16-bit": 0, "nf4": 0.01, "int4": 0.03})
    assert list(summary.loc["nf4", ["low", "high"]]) == pytest.approx([0.01, 0.01])
    half = 12.7062 * 0.01  # t of one degree, and the standard error of .02 and .04
    assert list(summary.loc["int4", ["low", "high"]]) == pytest.approx([0.03 - half, 0.03 + half], abs=1e-5)
    assert summary["before"].to_dict() == pytest.approx({"16-bit": 3.0, "nf4": 3.1, "int4": 3.3})
    assert summary.loc["16-bit", "mmlu"] == 53.0
    figure = draw_figure("qlora", make_adapters())
    assert figure.verdict.startswith("Beside nf4 adapters end above those beside 16 bits. Beside int4 no difference is")
    assert "win back 90%" in figure.verdict  # 1 - .01 / .1 and 1 - .03 / .3


def test_bases_of_other_blocks_are_bases_of_their_own() -> None:
    """Blocks of 256 cost .05, and a second experiment on a training that measures more is no second seed."""
    rows = []
    for seed in (0, 1):
        lora = {"steps": 9, "text": "t", "lora": {"rank": 2}} | ({"seed": seed} if seed else {})
        rows += [make_row("small", 4, 2.95 + seed, lora, block_size=block) for block in (256, None)]
        rows.append(make_row("small", 4, 2.91 + seed, lora) | {"key": f"other tasks {seed}"})
    data = tabulate_qlora(pd.concat([make_adapters(), pd.DataFrame(rows)]))
    assert data.groupby("base").size().to_dict() == {
        "16-bit": 2, "nf4": 2, "nf4 block 256": 2, "nf4 whole tensor": 2, "int4": 2,
    }  # fmt: skip
    means = summarize(data).set_index("base")["mean"]
    assert means[["nf4", "nf4 block 256"]].tolist() == pytest.approx([0.01, 0.05])


def test_one_seed_and_better_bases_are_said() -> None:
    table = make_adapters()
    one = judge_qlora(summarize(tabulate_qlora(table[table["train_seed"] != 1])))
    assert one.startswith("Beside nf4, int4 there is one seed, which shows no difference or likeness. On average")
    better = table.assign(value=table["value"] - 0.1 * ((table["data_type"] == "nf") & table["training"].notna()))
    assert judge_qlora(summarize(tabulate_qlora(better))).startswith(
        "Beside nf4 adapters end below those beside 16 bits. Beside int4 no difference is shown."
    )


def test_diverged_adapters_are_named() -> None:
    table = make_adapters()
    lost = make_row("small", 4, 0.0, {"steps": 9, "text": "t", "lora": {"rank": 2}, "seed": 2})
    figure = draw_figure("qlora", pd.concat([table, pd.DataFrame(end(lost, diverged=True))]))
    assert any("left out: nf4 1 of 3." in note for note in figure.notes)


# ---- curves


def test_curves_tell_bases_and_end_where_trainings_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bases of one training: one ended at step 60 of 400, one with a loss that is no number."""
    lora = {"steps": 400, "text": "t", "lora": {"rank": 2}}
    whole, shared = make_row("small", 16, 3.0, lora), make_row("small", 16, 3.0, lora) | {"key": "more tasks"}
    early, infinite = make_row("small", 4, 3.0, lora), make_row("small", 3, 3.0, lora)
    rows = [whole, *end(whole, diverged=False, steps=400), *end(shared, diverged=False, steps=400)]
    rows += end(early, diverged=True, steps=60) + end(infinite, diverged=True, steps=9)
    curves = {whole["key"]: np.linspace(4, 3, 50), early["key"]: np.linspace(4, 40, 50)}
    monkeypatch.setattr(training_curves, "read_items", lambda *_: curves)
    results = pd.DataFrame(rows)
    results.attrs["store"] = "somewhere"
    figure = draw_figure("training_curves", results)
    assert figure.verdict == "2 of 3 trainings diverged. None had a loss spike."
    ends = figure.data.groupby("training")["step"].max()
    assert sorted(ends) == pytest.approx([60 - 0.6, 400 - 4])
    assert [name.rpartition(" beside ")[2] for name in ends.sort_values().index] == ["nf4", "16-bit"]
    assert "1 training without a finite curve cannot be drawn." in figure.notes[0]


def test_aware_trainings_of_other_tensors_are_told_apart() -> None:
    aware = QAT_FIELDS | {"weights": {"bits": 3}}
    rows = [make_row("small", 3, 3.0, aware, include=include) for include in (None, "mlp")]
    rows += [make_row("small", bits, 3.0, QAT_FIELDS) for bits in (3, 4, 16)]  # one control
    ends = [one for row in rows for one in end(row, diverged=False)]
    assert len(training_curves.list_trainings(pd.DataFrame(ends))) == 3


@pytest.mark.parametrize(("name", "make"), [("qat", lambda: make_study(0.01)), ("qlora", make_adapters)])
def test_trainings_of_other_studies_may_be_measured_in_other_ways(name: str, make: Callable[[], pd.DataFrame]) -> None:
    other: dict[str, Any] = {"steps": 5, "text": "t", "start": "random"}
    rows = [make_row("small", 16, 4.0 + n, other | {"seed": n}, evaluation="64 windows") for n in (0, 1)]
    alone, together = make(), pd.concat([make(), pd.DataFrame(rows)], ignore_index=True)
    pd.testing.assert_frame_equal(draw_figure(name, together).data, draw_figure(name, alone).data)
    half = alone.assign(evaluation=np.where(alone["bits"] == 16, "64 windows", "e"))
    with pytest.raises(AmbiguousResults, match="f was measured in 2 ways"):
        draw_figure(name, half)
