"""A method is known by two registries and joins by one call; a scale format joins likewise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.methods.config import METHODS, Method, QuantConfig
from kbit.methods.quantize_model import METHOD_FUNCTIONS, quantize_model, register_method
from kbit.methods.report import plan_quantization
from kbit.methods.weight import Codes, Job, Weight
from kbit.numerics.quantizer import fake_quantize, quantize
from kbit.numerics.scale_formats import SCALE_FORMATS, ScaleFormat, Scales, Stored, register_scale_format
from kbit.numerics.spec import QuantSpec


def quantize_halves(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """A method of a third party: everything is halved first."""
    for weight in job.weights:
        with weight.outliers_at_zero() as values:
            yield weight, quantize(values / 2, weight.spec)
    job.notes["halved"] = len(job.weights)


@pytest.fixture
def halves() -> Iterator[str]:
    register_method(Method("halves", minimises_error=True), quantize=quantize_halves)
    yield "halves"
    del METHODS["halves"], METHOD_FUNCTIONS["halves"]


def test_each_method_of_the_configuration_has_its_function() -> None:
    assert METHOD_FUNCTIONS.keys() == METHODS.keys()
    assert all(name == method.name for name, method in METHODS.items())


def test_a_registered_method_works_like_kbits_own(halves: str, build_tiny: Callable[..., Any]) -> None:
    config = QuantConfig(bits=3, data_type="nf", block_size=16, method=halves)
    model = build_tiny("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    before = model.get_parameter(name).detach().clone()
    report = quantize_model(model, config)
    assert torch.equal(model.get_parameter(name).detach(), fake_quantize(before / 2, config.spec))
    assert report == plan_quantization(build_tiny("llama"), config)
    assert report.notes == {"halved": 14}
    assert config.label() == "nf3"
    experiments = [Experiment(quant=quant) for quant in (config, QuantConfig(bits=3, data_type="nf", block_size=16))]
    assert find_key(experiments[0]) != find_key(experiments[1])
    assert experiments[0].label().endswith("nf3 block 16 halves")
    with pytest.raises(ValueError, match=r"quant\.method=halves minimises an error"):
        QuantConfig(method=halves, rounding="stochastic")


def test_a_name_is_registered_once(halves: str) -> None:
    with pytest.raises(ValueError, match=r"quant\.method=halves is registered already"):
        register_method(Method(halves), quantize_halves)
    with pytest.raises(ValueError, match="scale_format=fp16 is registered already"):
        register_scale_format(SCALE_FORMATS["fp16"])


class TruncatedScales(ScaleFormat):
    """A scale format of a third party: the upper byte of a bfloat16 number each, powers of two to the fourth."""

    name = "e7m0"

    def store(self, values: Scales, lost: NDArray[np.bool_]) -> Stored:
        return {"scales": np.maximum(values.view(np.uint32) >> 24, lost).astype(np.uint8)}

    def decode(self, stored: Mapping[str, NDArray[Any]]) -> Scales:
        return (stored["scales"].astype(np.uint32) << 24).view(np.float32)

    def list_arrays(self, blocks: int) -> dict[str, tuple[type[np.generic], int]]:
        return {"scales": (np.uint8, blocks)}


@pytest.fixture
def truncated() -> Iterator[str]:
    register_scale_format(TruncatedScales())
    yield "e7m0"
    del SCALE_FORMATS["e7m0"]


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_a_registered_scale_format_works_like_kbits_own(
    truncated: str, method: str, build_tiny: Callable[..., Any]
) -> None:
    config = QuantConfig(bits=4, data_type="nf", block_size=16, scale_format=truncated, method=method)
    report = quantize_model(build_tiny("llama"), config)
    assert report.bits_per_param == 4 + 8 / 16
    usual = QuantConfig(bits=4, data_type="nf", block_size=16)
    assert find_key(Experiment(quant=config)) != find_key(Experiment(quant=usual))
    with pytest.raises(ValueError, match=r"scale_format='e7m1' is not one of: .*e7m0; did you mean e7m0"):
        QuantSpec(scale_format="e7m1")
