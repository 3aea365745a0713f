"""Conditions on rows: what they choose, beside pandas' own query, and what they refuse to do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from toy_results import fill

from kbit.store.conditions import count_undecided, select_rows
from kbit.store.readers import read_results
from kbit.store.tables import write_csv


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Twelve results of four quantizers, the 16-bit baseline among them, two rows each."""
    path = tmp_path_factory.mktemp("results")
    fill(path, range(12))
    return read_results(path)


SAME_AS_PANDAS = [
    "bits == 4",
    "bits != 16 and value > 3.5",
    "bits in [3, 16]",
    "bits not in (3, 16)",
    "task == 'nano_cloze'",
    "task in ['nano_cloze', 'b'] and not bits == 16",
    "(bits == 3) | (bits == 4) & (value < 9)",
    "~(bits == 3)",
    "3 <= bits < 16",
    "4 == bits",
    "value * 2 - 1 > n / 50 + 6",
    "bits // 2 == 1 or bits % 2 == 1",
    "centering == True",
    "n >= 1e2",
    "-value < -4",
    "bits == [3, 4]",
]


@pytest.mark.parametrize("where", SAME_AS_PANDAS)
def test_rows_are_those_of_pandas_query(table: pd.DataFrame, where: str) -> None:
    expected = table.query(where)
    assert 0 < len(expected) < len(table)
    pd.testing.assert_frame_equal(select_rows(table, where), expected)


def test_missing_values_are_neither_true_nor_false(table: pd.DataFrame) -> None:
    baseline = int((table["bits"] == 16).sum())
    assert len(select_rows(table, "data_type == 'int'")) == len(select_rows(table, "not data_type != 'int'")) == 6
    assert len(select_rows(table, "data_type != 'int'")) == len(table) - baseline - 6
    assert len(select_rows(table, "data_type == None")) == baseline
    assert len(select_rows(table, "data_type != None")) == len(table) - baseline
    assert len(select_rows(table, "data_type == 'int' or bits == 16")) == baseline + 6
    assert len(select_rows(table, "block_size == None and bits < 16")) == 6  # the whole tensor


def test_a_filter_on_quantizers_keeps_the_baseline_of_a_figure(table: pd.DataFrame) -> None:
    for where, kept in (("data_type == 'int'", 12), ("data_type == 'int' and task == 'nano_cloze'", 6)):
        rows = select_rows(table, where, keep_baseline=True)
        assert len(rows) == kept
        assert set(rows["bits"]) == {4, 16}
        assert count_undecided(table, where) == kept / 2
    for where in ("bits == 4", "bits < 16", "bits == 4 and method == 'rtn'", "bits_per_param < 5 and layout == 'flat'"):
        rows = select_rows(table, where, keep_baseline=True)  # its own bits and method are not what is asked for
        assert set(rows["bits"]) >= {4, 16}
        assert (rows["bits"] == 16).sum() == (table["bits"] == 16).sum()
    for where in (
        "bits == 4 and task == 'no such'",
        "model == 'no such' and bits == 4",
        "not (bits == 4 or value > -9)",
    ):
        assert select_rows(table, where, keep_baseline=True).empty  # what is no setting of a quantizer counts


def test_a_filter_on_trainings_counts_for_16_bits(table: pd.DataFrame) -> None:
    seeds = table.assign(training="trained 3 steps", train_seed=[0, 1] * (len(table) // 2))
    rows = select_rows(seeds, "train_seed == 1", keep_baseline=True)
    assert set(rows["train_seed"]) == {1}
    assert 16 in set(rows["bits"])
    assert select_rows(seeds, "training == 'trained 4 steps' and bits == 4", keep_baseline=True).empty


@pytest.mark.parametrize(
    "where",
    [
        "value.sum() > 3", "bits.__class__ == 3", "@x == 3", "bits == @x", "__import__('os')", "[bits for x in y]",
        "lambda: 3", "bits ** 2 == 9", "bits if bits else 3", "f'{bits}' == 'a'", "bits == '4'", "data_type == 3",
        "bitz == 4", "bits", "3", "'nf'", "True", "bits + 1", "bits ===", "bits = 4", "", "bits == None + 1",
        "bits is 3",
        "bits < None", "1 / 0 == bits", "bits == 4 and 3", "bits[0] == 3", "not bits", "bits in data_type", "'\\ud800",
        "(" * 500, "bits == " + "-" * 5000 + "3", "bits == b'4'", "data_type in [3]", "value == 1j", "(x := 3) == bits",
        "bits == 10**9**9", "\0",
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(table: pd.DataFrame, where: str) -> None:
    with pytest.raises(ValueError, match=r"--where .*columns are key, model"):
        select_rows(table, where)


def test_texts_are_no_formulas(tmp_path: Path) -> None:
    """Of a spreadsheet that opens the file. Numbers stay numbers."""
    texts = ["=1+2", "+x", "-x", "@x", "\tx", "nano", None]
    table = pd.DataFrame({"model": texts, "value": [-1.5, 2, 3, 4, 5, 6, 7], "n": pd.array([-1] * 7, dtype="Int64")})
    write_csv(table, tmp_path / "out.csv")
    read = pd.read_csv(tmp_path / "out.csv")
    assert read["model"].tolist()[:6] == ["'=1+2", "'+x", "'-x", "'@x", "'\tx", "nano"]
    assert (read["value"].tolist(), read["n"].tolist()) == (table["value"].tolist(), [-1] * 7)
    assert table["model"].tolist()[:6] == texts[:6]


def test_settings_as_words_lose_no_row_in_a_pivot_table(tmp_path: Path) -> None:
    fill(tmp_path, range(8))
    table = read_results(tmp_path, words=True)
    pivot = table.pivot_table(index=["data_type", "exponent_bits", "block_size"], columns="metric", values="value")
    assert len(pivot) == 4
    assert pivot.index.to_list() == [
        ("float", 2, 64), ("int", "none", 64), ("nf", "none", "whole"), ("none", "none", "none")
    ]  # fmt: skip
    assert table["key"].nunique() == 8
    assert read_results(tmp_path).dtypes["exponent_bits"] == pd.Int64Dtype()


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("data_type == nf", "no column 'nf'; a value that is text is quoted: 'nf'; did you mean n?"),
        ("nf == data_type", "a value that is text is quoted: 'nf'"),
        ("data_type in [int]", "no column 'int'; a value that is text is quoted: 'int'"),
        ("bitz == 4", "did you mean bits?"),
    ],
)
def test_a_text_without_quotes_is_told_from_a_column(table: pd.DataFrame, where: str, hint: str) -> None:
    with pytest.raises(ValueError, match="no column") as refused:
        select_rows(table, where)
    assert hint in str(refused.value)
