"""The relative error of the quantized weights that each report and result carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kbit.methods.quantize_model import quantize_model
from kbit.methods.report import plan_quantization
from kbit.numerics.spec import QuantSpec

NF3 = QuantSpec(bits=3, data_type="nf")


def test_it_is_that_of_all_quantized_weights_together(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2")
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    report = quantize_model(model, NF3)
    names = [t.name.split(" = ")[0] for t in report.tensors if t.quantized]
    after = dict(model.named_parameters())
    lost = sum(float((after[name].detach().double() - before[name]).square().sum()) for name in names)
    whole = sum(float(before[name].square().sum()) for name in names)
    assert report.weight_rmse == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


def test_it_is_zero_of_the_baseline_and_unknown_of_a_plan(build_tiny: Callable[..., Any]) -> None:
    assert quantize_model(build_tiny("gpt2"), QuantSpec(bits=16)).weight_rmse == 0
    assert plan_quantization(build_tiny("gpt2"), NF3).weight_rmse is None
