"""Conditions on a table's rows, as --where takes them, such as "bits == 4 and data_type in ['int', 'nf']".

Names of columns, literals, comparisons, `in`, and, or, not, parentheses and + - * / // % are the whole grammar. Nothing
is called and no attribute is read, so that a condition from elsewhere can do nothing but choose rows.

A comparison with a missing value is neither true nor false (Kleene's logic), and a row for which a condition is not
true is not chosen. `block_size == None` finds the missing ones.
"""

from __future__ import annotations

import ast
import io
import operator
import tokenize
from collections.abc import Callable
from typing import Any, Final

import pandas as pd

from kbit.checks import ask_for_nearest
from kbit.methods.options import RUN_TIME
from kbit.store.rows import SETTING_COLUMNS

_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_COMBINE: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_OF_TRAININGS: Final = ("training", "train_seed")  # which a 16-bit model has as any other
# of which a 16-bit baseline has none to choose
QUANTIZER_COLUMNS: Final = (
    "bits", "bits_per_param", *(name for name in SETTING_COLUMNS if name not in _OF_TRAININGS),
)  # fmt: skip
_WORDS: Final = {"&": "and", "|": "or", "~": "not"}  # pandas' own query takes these too
_GRAMMAR: Final = "columns, values, == != < <= > >= in, and or not, + - * / // % and parentheses are allowed"
_TRUTH: Final = "boolean"  # the dtype of what is true, false or neither


def select_rows(table: pd.DataFrame, where: str, *, keep_baseline: bool = False) -> pd.DataFrame:
    """Return the rows of a table for which a condition is true.

    Args:
        table: the table.
        where: the condition.
        keep_baseline: whether a condition on a quantizer's settings, bits among them, says nothing of 16-bit baselines,
            which are then kept if the rest of the condition does not exclude them. A figure needs them whatever the
            quantizers to draw.

    Raises:
        ValueError: the text is not a condition, or names no column.
    """
    holds = _evaluate(table, where)
    if keep_baseline and {"bits", "data_type"} <= set(table.columns):
        found = _evaluate(_without_settings(table[is_baseline(table)]), where)
        holds = holds.mask(is_baseline(table), found.fillna(True).reindex(table.index))
    return table[holds.fillna(False).astype(bool)]


def _without_settings(baseline: pd.DataFrame) -> pd.DataFrame:
    """Return a baseline's rows with every setting of a quantizer missing."""
    settings = [name for name in QUANTIZER_COLUMNS if name in baseline]
    truths = {name for name in settings if pd.api.types.is_bool_dtype(baseline[name].dtype)}
    missing = {name: pd.Series(pd.NA, baseline.index, _TRUTH if name in truths else object) for name in settings}
    return baseline.assign(**missing)


def count_undecided(table: pd.DataFrame, where: str) -> int:
    """Return the number of the 16-bit baseline's rows for which a condition is neither true nor false."""
    return int((_evaluate(table, where).isna() & is_baseline(table)).sum())


def is_baseline(table: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows of a table of results are a 16-bit model's, of which nothing is quantized."""
    changes = [name for name in ("data_type", "checkpoint", *RUN_TIME) if name in table.columns]
    return table[changes].isna().all(axis=1)


def _evaluate(table: pd.DataFrame, where: str) -> pd.Series[bool]:
    """Return for each row whether a condition is true, false or (missing) neither."""
    columns = ", ".join(table.columns)
    try:
        found = _Reader(table).visit(ast.parse(_write_words(where), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(
            f"--where {where!r} cannot be read: {error.msg}; {_GRAMMAR}; the columns are {columns}"
        ) from None
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"--where {where!r}: {error}; {_GRAMMAR}; the columns are {columns}") from None
    if not isinstance(found, pd.Series) or found.dtype != _TRUTH:
        raise ValueError(f'--where {where!r} is no condition, such as "bits == 4"; the columns are {columns}')
    return found


def _write_words(where: str) -> str:
    """Return a condition with the words and, or, not in place of their signs."""
    tokens = list(tokenize.generate_tokens(io.StringIO(where.strip()).readline))
    return tokenize.untokenize((token.type, _WORDS.get(token.string, token.string)) for token in tokens)


class _Reader(ast.NodeVisitor):
    """Evaluates the nodes of a condition. A node gives a column, a value, or a list of values."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._table = table

    def generic_visit(self, node: ast.AST) -> Any:
        raise ValueError(f"{ast.unparse(node)!r} is not allowed")

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id not in self._table.columns:
            meant = [f"a value that is text is quoted: {node.id!r}", ask_for_nearest(node.id, self._table.columns)]
            raise ValueError(f"no column {node.id!r}; {'; '.join(filter(None, meant))}")
        column = self._table[node.id]
        return column.astype(_TRUTH) if pd.api.types.is_bool_dtype(column.dtype) or _holds_truth(column) else column

    def visit_Constant(self, node: ast.Constant) -> Any:
        if node.value is not None and not isinstance(node.value, str | int | float):
            raise ValueError(f"{ast.unparse(node)!r} is no text, number, True, False or None")
        return node.value

    def visit_List(self, node: ast.List | ast.Tuple) -> list[Any]:
        return [self.visit(item) for item in node.elts]

    visit_Tuple = visit_List

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        first, *others = [_as_truth(self.visit(value), value) for value in node.values]
        for other in others:
            first = first & other if isinstance(node.op, ast.And) else first | other
        return first

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ~_as_truth(value, node.operand)
        if isinstance(node.op, ast.USub | ast.UAdd):
            return (
                -_as_number(value, node.operand) if isinstance(node.op, ast.USub) else _as_number(value, node.operand)
            )
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        if type(node.op) not in _COMBINE:
            return self.generic_visit(node)
        left, right = (_as_number(self.visit(side), side) for side in (node.left, node.right))
        return _COMBINE[type(node.op)](left, right)

    def visit_Compare(self, node: ast.Compare) -> Any:
        sides = [self.visit(side) for side in (node.left, *node.comparators)]
        found = [self._compare(*step) for step in zip(sides, node.ops, sides[1:], strict=False)]
        whole = found[0]
        for other in found[1:]:  # 3 <= bits <= 5
            whole = whole & other
        return whole

    def _compare(self, left: Any, comparison: ast.cmpop, right: Any) -> Any:
        """Return for each row what a comparison gives. It is missing where a side is."""
        if not isinstance(left, pd.Series):
            if isinstance(right, pd.Series) and type(comparison) in _MIRRORED:
                return self._compare(right, _MIRRORED[type(comparison)](), left)
            raise ValueError("a comparison needs a column on its left side")
        if isinstance(right, list) or isinstance(comparison, ast.In | ast.NotIn):
            return _compare_with_list(left, comparison, right)
        if right is None and isinstance(comparison, ast.Eq | ast.NotEq):
            return (left.isna() if isinstance(comparison, ast.Eq) else left.notna()).astype(_TRUTH)
        if right is None or type(comparison) not in _COMPARE:
            raise ValueError("a comparison with None is == None or != None")
        _check_kinds(left, right)
        unknown = left.isna() | (right.isna() if isinstance(right, pd.Series) else False)
        return _COMPARE[type(comparison)](left, right).astype(_TRUTH).mask(unknown)


_MIRRORED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.Eq, ast.NotEq: ast.NotEq, ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE,
}  # fmt: skip


def _compare_with_list(column: pd.Series[Any], comparison: ast.cmpop, values: Any) -> pd.Series[bool]:
    if not isinstance(values, list) or not isinstance(comparison, ast.In | ast.NotIn | ast.Eq | ast.NotEq):
        raise ValueError("`in` needs a list of values, such as [3, 4]")
    for value in values:
        if isinstance(value, pd.Series | list) or value is None:
            raise ValueError("a list holds texts or numbers")
        _check_kinds(column, value)
    found = column.isin(values).astype(_TRUTH).mask(column.isna())
    return ~found if isinstance(comparison, ast.NotIn | ast.NotEq) else found


def _find_kind(value: Any) -> str:
    if isinstance(value, pd.Series):
        if value.dtype == _TRUTH:
            return "true or false"
        return "numbers" if pd.api.types.is_numeric_dtype(value.dtype) or value.isna().all() else "texts"
    return {bool: "true or false", str: "texts", list: "lists"}.get(type(value), "numbers")


def _check_kinds(left: pd.Series[Any], right: Any) -> None:
    """Raise ValueError if no value of a column can equal the other side, which is then a mistake."""
    kinds = _find_kind(left), _find_kind(right)
    if kinds[0] != kinds[1] and not any(isinstance(side, pd.Series) and side.isna().all() for side in (left, right)):
        shown = "another column" if isinstance(right, pd.Series) else repr(right)
        raise ValueError(f"{left.name} holds {kinds[0]}, and {shown} is not one of them")


def _holds_truth(column: pd.Series[Any]) -> bool:
    """Whether an object column, as a column of bool with missing values is, holds True and False only."""
    values = column.dropna()
    return column.dtype == object and len(values) > 0 and bool(values.map(lambda value: isinstance(value, bool)).all())


def _as_truth(value: Any, node: ast.expr) -> Any:
    if not isinstance(value, pd.Series) or value.dtype != _TRUTH:
        raise ValueError(f"{ast.unparse(node)!r} is no condition")
    return value


def _as_number(value: Any, node: ast.expr) -> Any:
    if _find_kind(value) != "numbers" or value is None:
        raise ValueError(f"{ast.unparse(node)!r} is no number")
    return value
