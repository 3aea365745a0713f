"""Codebooks: golden tables of bitsandbytes and the papers, formulas, and what is refused."""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from kbit.numerics.codebooks import (
    PAPER_EXPONENT_BITS,
    data_type_label,
    decision_thresholds,
    dynamic_codebook,
    float_codebook,
    int_codebook,
    nf_codebook,
)
from kbit.numerics.data_types import make_codebook

BITS = range(2, 9)
# Tables computed from the published formulas and from bitsandbytes' public history; each row names its source.
GOLDEN = Path(__file__).parents[1] / "golden"
TYPES = ["int", "float", "dynamic", "quantile", "nf", "af", "learned"]
FLOAT_SPLITS = [(bits, exponent) for bits in BITS for exponent in range(1, bits)]
GOLDEN_BIAS = {"V0": "ieee", "V1": "bnb", "V2": "paper"}  # names of the golden table -> ours


def read_golden() -> dict[tuple[str, int], list[float]]:
    """Return sorted values by (codebook, bits) of the table of computed codebooks."""
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    with (GOLDEN / "codebooks_computed.csv").open() as file:
        for row in csv.DictReader(file):
            values[row["codebook"], int(row["k_bits"])].append(float(row["value_normalized"]))
    return {name: sorted(set(v)) for name, v in values.items()}


def assert_equals_golden(codebook: np.ndarray, golden: list[float]) -> None:
    # The table prints 12 decimals (error 5e-13), float32 rounds to half a unit in the last place (2^-25 below 1).
    assert len(codebook) == len(golden)
    np.testing.assert_allclose(codebook, golden, rtol=2.0**-24, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_int_dynamic_and_nf_equal_the_golden_tables(bits: int) -> None:
    golden = read_golden()
    assert_equals_golden(int_codebook(bits), golden["int (symmetric, 2^k-1 levels)", bits])
    # computed in float32 as the original is (test_oracles): four roundings of 2^-24 each
    np.testing.assert_allclose(dynamic_codebook(bits), golden["dynamic exponent signed", bits], rtol=2.0**-22)
    name = "NormalFloat k, offset(k)=1-0.5*(1/(2(2^k-1))+1/(2*2^k))"
    if bits == 4:  # the published NF4 differs from the formula by up to 1.1e-7
        np.testing.assert_allclose(nf_codebook(4), golden[name, 4], atol=1.2e-7)
    else:
        assert_equals_golden(nf_codebook(bits), golden[name, bits])


def test_every_golden_float_table_is_reproduced() -> None:
    tables = {name: values for name, values in read_golden().items() if name[0].startswith("float ")}
    assert len(tables) == 36  # twelve splits x three conventions
    for (name, bits), golden in tables.items():
        _, split, version = name.split()
        assert_equals_golden(float_codebook(bits, int(split[1]), GOLDEN_BIAS[version]), golden)


def test_nf4_is_the_published_table_bit_for_bit() -> None:
    with (GOLDEN / "bnb_4bit_tables_exact.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["type"] == "nf4"]
    published = np.array([float(row["value_normalized"]) for row in rows], np.float32)
    assert nf_codebook(4).tobytes() == published.tobytes()


def test_float_with_the_papers_bias_is_the_fp4_kernel_table() -> None:
    with (GOLDEN / "bnb_4bit_tables_exact.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["type"].startswith("fp4")]
    published = sorted({float(row["value_normalized"]) + 0.0 for row in rows})
    np.testing.assert_array_equal(float_codebook(4, 2, "paper"), np.array(published, np.float32))


def test_quantile_of_a_normal_sample_approaches_the_ideal_table() -> None:
    golden = read_golden()
    sample = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)
    for bits in (3, 4, 5):
        ideal = np.array(golden["quantile of N(0,1), paper eq.6 (i=1..2^k-1)", bits])
        codebook = make_codebook("quantile", bits, tensor=sample)
        nearest = np.abs(codebook[:, None] - ideal).min(axis=1)
        # Standard error of an extreme quantile at p = 1/33 of 2^20 values is below 0.003; four of them, and float16.
        assert nearest.max() < 0.012


def test_quantile_follows_equation_6_exactly() -> None:
    x = np.array([-4.0, -1.0, 0.0, 2.0, 8.0])
    # bits = 2: Q at 1/5 .. 4/5, interpolating the order statistics; midpoints, divided by the largest; and 0
    q = np.quantile(x, [0.2, 0.4, 0.6, 0.8])
    midpoints = (q[:-1] + q[1:]) / 2
    expected = np.unique(np.append(midpoints / np.abs(midpoints).max(), 0).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(make_codebook("quantile", 2, tensor=x), expected)


def test_quantile_of_an_almost_empty_tensor_keeps_its_outliers() -> None:
    x = np.zeros(1000)
    x[3] = 5.0
    np.testing.assert_array_equal(make_codebook("quantile", 4, tensor=x), [-1, 0, 1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("data_type", TYPES)
def test_codebook_is_a_sorted_normalized_table_with_an_exact_zero(data_type: str, bits: int) -> None:
    sample = np.random.default_rng(1).standard_normal(4096)
    codebook = make_codebook(data_type, bits, tensor=sample / np.abs(sample).max(), block_size=64)
    assert codebook.dtype == np.float32
    assert 2 <= codebook.size <= 2**bits
    assert (np.diff(codebook) > 0).all()
    assert np.abs(codebook).max() <= 1
    assert data_type == "learned" or np.abs(codebook).max() == 1
    assert (codebook == 0).sum() == 1
    assert not codebook.flags.writeable


@pytest.mark.parametrize(("bits", "exponent_bits"), FLOAT_SPLITS)
@pytest.mark.parametrize("bias", ["ieee", "bnb", "paper"])
def test_float_is_symmetric_and_conventions_differ_only_in_subnormals(bits: int, exponent_bits: int, bias: str) -> None:
    codebook = float_codebook(bits, exponent_bits, bias)
    assert codebook.size == 2**bits - 1  # both zeros are one value
    np.testing.assert_array_equal(codebook, -codebook[::-1])
    ieee = float_codebook(bits, exponent_bits)
    subnormals = 2 ** (bits - 1 - exponent_bits) - 1
    differing = int((codebook != ieee).sum())
    assert differing == (0 if bias == "ieee" else 2 * subnormals)


@pytest.mark.parametrize(
    ("bits", "exponent_bits", "ml_dtype"),
    [(8, 4, "float8_e4m3"), (8, 3, "float8_e3m4"), (8, 5, "float8_e5m2"), (6, 2, "float6_e2m3fn"),
     (6, 3, "float6_e3m2fn"), (4, 2, "float4_e2m1fn")],
)  # fmt: skip
def test_ieee_float_equals_ml_dtypes(bits: int, exponent_bits: int, ml_dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    patterns = np.arange(2**bits, dtype=np.uint8).view(getattr(ml_dtypes, ml_dtype)).astype(np.float64)
    finite = np.unique(patterns[np.isfinite(patterns)])
    codebook = float_codebook(bits, exponent_bits).astype(np.float64)
    # Formats with Inf and NaN give their top exponent (or top code) to them, so ours reaches further: compare from
    # the smallest positive value up, where both start.
    ours, theirs = codebook[codebook > 0], finite[finite > 0]
    np.testing.assert_allclose(ours[: theirs.size] / ours[0], theirs / theirs[0], rtol=2.0**-23)


def test_thresholds_are_midpoints_and_ties_go_away_from_zero() -> None:
    thresholds = decision_thresholds(np.array([-1.0, -0.5, 0.0, 0.5, 1.0], np.float32))
    above = np.nextafter(np.array([-0.75, -0.25], np.float32), np.float32(1))
    np.testing.assert_array_equal(thresholds, [*above, 0.25, 0.75])


@pytest.mark.parametrize("bits", BITS)
def test_all_values_decode_to_themselves_and_neighbours_split_at_their_midpoint(bits: int) -> None:
    sample = np.random.default_rng(2).standard_normal(4096)
    for data_type in TYPES:
        codebook = make_codebook(data_type, bits, tensor=sample / np.abs(sample).max(), block_size=64)
        thresholds = decision_thresholds(codebook)
        codes = (codebook[:, None] >= thresholds).sum(axis=1)
        np.testing.assert_array_equal(codes, np.arange(codebook.size))
        for j, (low, high) in enumerate(itertools.pairwise(codebook.astype(np.float64))):
            middle = np.float32((low + high) / 2)
            away_from_zero = j + 1 if middle >= 0 else j
            assert (middle >= thresholds).sum() == away_from_zero


def test_papers_exponent_bits() -> None:
    assert {bits: PAPER_EXPONENT_BITS[bits] for bits in range(3, 9)} == {3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}
    np.testing.assert_array_equal(make_codebook("float", 3), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])


def test_labels() -> None:
    assert data_type_label("nf", 4) == "nf4"
    assert data_type_label("float", 4) == "float4-e3m0"
    assert data_type_label("float", 4, 2) == "float4-e2m1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"data_type": "floot", "bits": 4},
            "'floot' is not one of: int, float, dynamic, quantile, nf, af, learned, table",
        ),
        ({"data_type": "int", "bits": 1}, "bits=1 is not in 2..8"),
        ({"data_type": "int", "bits": 9}, "bits=9 is not in 2..8"),
        (
            {"data_type": "float", "bits": 4, "exponent_bits": 4},
            "exponent_bits=4 does not fit bits=4: allowed are 1..3",
        ),
        ({"data_type": "float", "bits": 4, "exponent_bits": 0}, "exponent_bits=0 does not fit bits=4"),
        ({"data_type": "float", "bits": 4, "float_bias": "x"}, "float_bias='x' is not one of: ieee, bnb, paper"),
        ({"data_type": "quantile", "bits": 4}, "data_type 'quantile' needs tensor="),
        ({"data_type": "af", "bits": 4}, "data_type 'af' needs block_size="),
        ({"data_type": "table", "bits": 4}, "data_type 'table' needs table="),
        ({"data_type": "table", "bits": 4, "table": [0.0, 2.0]}, "values outside"),
        (
            {"data_type": "table", "bits": 2, "table": [-1.0, -0.5, 0.0, 0.5, 1.0]},
            "5 distinct values; bits=2 allows 2..4",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("..", r"\.\.")):
        make_codebook(**arguments)  # type: ignore[arg-type]


def expected_absolute_error(codebook: np.ndarray, normalized: np.ndarray) -> float:
    """Mean distance of the values to the nearest value of the table."""
    codes = (normalized[:, None] >= decision_thresholds(codebook)).sum(axis=1)
    return float(np.abs(normalized - codebook[codes]).mean())


@pytest.mark.parametrize("block_size", [16, 64, 1024])
def test_abnormal_float_has_less_absolute_error_than_normal_float(block_size: int) -> None:
    x = np.random.default_rng(0).standard_normal((2**18 // block_size, block_size)).astype(np.float32)
    normalized = (x / np.abs(x).max(axis=1, keepdims=True)).ravel()
    af = expected_absolute_error(make_codebook("af", 4, block_size=block_size), normalized)
    assert af < expected_absolute_error(make_codebook("nf", 4), normalized)


def test_abnormal_float_is_better_than_the_published_table() -> None:
    with (GOLDEN / "bnb_4bit_tables_exact.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["type"].startswith("af4")]
    published = np.array([float(row["value_normalized"]) for row in rows], np.float32)
    ours = make_codebook("af", 4, block_size=64)
    x = np.random.default_rng(0).standard_normal((2**12, 64)).astype(np.float32)
    normalized = (x / np.abs(x).max(axis=1, keepdims=True)).ravel()
    assert ours.size == published.size == 16
    assert expected_absolute_error(ours, normalized) < expected_absolute_error(published, normalized)


def test_learned_values_have_less_squared_error_than_any_fixed_table() -> None:
    x = np.random.default_rng(0).laplace(size=(2**12, 64)).astype(np.float32)
    normalized = (x / np.abs(x).max(axis=1, keepdims=True)).ravel()

    def squared_error(codebook: np.ndarray) -> float:
        codes = (normalized[:, None] >= decision_thresholds(codebook)).sum(axis=1)
        return float(((normalized - codebook[codes]) ** 2).mean())

    learned = squared_error(make_codebook("learned", 4, tensor=normalized))
    assert all(learned < squared_error(make_codebook(t, 4)) for t in ("int", "float", "dynamic", "nf"))


def test_truncation_thresholds_are_the_neighbours_farther_from_zero() -> None:
    thresholds = decision_thresholds(np.array([-1, -0.5, 0, 0.5, 1], np.float32), "truncate")
    above = np.nextafter(np.array([-1, -0.5], np.float32), np.float32(1))
    np.testing.assert_array_equal(thresholds, [*above, 0.5, 1])
