"""`kbit run --help` and docs/reference/options.md: every key, its value and its meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbit.cli.hydra.options import describe_kind, list_sections, write_help, write_page, write_value
from kbit.experiments.config import RunConfig
from kbit.numerics.spec import QuantSpec
from kbit.training.config import ROLES

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = dataclasses.asdict(RunConfig())
SPEC = {field.name for field in dataclasses.fields(QuantSpec)}


def list_leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of every value of nested dicts."""
    for name, value in values.items():
        if f"{prefix}{name}" in {*(f"train.{role}" for role in ROLES), "quant.activations", "quant.kv_cache"}:
            yield f"{prefix}{name}.bits"  # which stands for the other keys of a quantizer
            yield from (f"{prefix}{name}.{own}" for own in value if own not in SPEC)
        elif isinstance(value, dict):
            yield from list_leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_has_a_meaning_once() -> None:
    keys = [key for section in list_sections() for key in section.keys]
    assert sorted(key.name for key in keys) == sorted(list_leaves(DEFAULTS))
    assert [key.name for key in keys if len(key.meaning) < 12 or not key.meaning.endswith(".") or not key.kind] == []
    assert [key.name for key in keys if "None" in key.meaning] == []


def test_a_meaning_is_the_whole_entry_of_the_docstring() -> None:
    meanings = {key.name: key.meaning for section in list_sections() for key in section.keys}
    assert meanings["quant.block_size"] == (
        "elements per block, >= 1. null is the whole tensor (the whole row if layout=row)."
    )
    assert meanings["quant.seed"].endswith("so that tensors do not share their random numbers.")  # Raises follows
    assert meanings["quant.exclude"] == "regular expression of tensor names not to quantize."


def test_the_page_of_the_documentation_is_current() -> None:
    page = (ROOT / "docs" / "reference" / "options.md").read_text()
    assert page == write_page(), "run: python -m kbit.cli.hydra.options >docs/reference/options.md"


def test_help_shows_what_is_composed(kbit: Kbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = kbit("run", "quant=mxfp4", "results='a$b'", "eval.tasks=[]", "--help")
    assert done.code == 0
    lines = done.out.splitlines()
    assert "quant.block_size=32               elements per block, >= 1. null is the whole" in lines
    for shown in ("results=a$b ", "quant.scale_format=e8m0 ", "eval.tasks=[] ", "model.revision=null ", "nano/quick"):
        assert any(line.startswith(shown) or shown in line for line in lines), shown
    keys = lines[lines.index("") : lines.index("", len(lines) // 2)]
    assert max(map(len, keys)) <= 80


def test_help_fits_a_terminal_of_any_width() -> None:
    for width in (1, 72, 100, 500):
        text = write_help(DEFAULTS, width).splitlines()
        assert max(map(len, text)) <= max(72, min(width, 120))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (tuple[str, ...], "a list, such as [a,b]"),
        (str | None, "text or null"),
    ],
    ids=str,
)
def test_kinds_are_said_in_words(kind: Any, words: str) -> None:
    assert describe_kind(kind) == words


def test_values_are_written_as_on_the_command_line() -> None:
    values: tuple[Any, ...] = (None, True, 0.5, "nf", ("a", "b"), [])
    assert [write_value(value) for value in values] == ["null", "true", "0.5", "nf", "[a,b]", "[]"]
