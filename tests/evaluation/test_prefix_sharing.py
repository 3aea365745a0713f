"""Rows of shared beginnings: every token is where it belongs, sees what it should, and is there once."""

from __future__ import annotations

import random
from itertools import takewhile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit.evaluation.prefix_sharing import Query, Row, build_batch, find_visible, order_rows, share_prefixes, take_batch

LONGEST = 64

# Few different tokens, so that beginnings are shared often; the last is not fed.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=20), min_size=1, max_size=12)


def make_queries(texts: list[list[int]]) -> list[Query]:
    """A query for each text, its last third scored."""
    return [Query(i, text[:-1], text[-max(1, len(text) // 3) :]) for i, text in enumerate(texts)]


def lay_out(queries: list[Query]) -> list[Row]:
    return order_rows(share_prefixes(queries, LONGEST))


@given(sequences)
def test_every_query_is_in_one_row_that_is_no_longer_than_allowed(texts: list[list[int]]) -> None:
    rows = lay_out(make_queries(texts))
    assert sorted(q.index for row in rows for q in row.queries) == list(range(len(texts)))
    assert all(row.length <= LONGEST for row in rows if len(row.queries) > 1)
    assert sum(row.length for row in rows) <= sum(len(text) - 1 for text in texts)
    for row in rows:
        assert len({tuple(q.tokens[: row.prefix]) for q in row.queries}) == 1


@given(sequences, st.integers(0, LONGEST))
def test_a_row_is_as_long_as_it_was_counted_to_be(texts: list[list[int]], longest: int) -> None:
    """The slow truth: each query joins the last row if the row that they make, measured, is short enough."""
    expected: list[Row] = []
    for query in sorted(queries := make_queries(texts), key=lambda q: q.tokens):
        if expected:
            last = expected[-1]
            alike = zip(last.queries[0].tokens[: last.prefix], query.tokens, strict=False)
            prefix = len(list(takewhile(lambda pair: pair[0] == pair[1], alike)))
            joined = Row(prefix, [*last.queries, query])
            if joined.length <= max(last.length, min(longest, last.length + len(query.tokens) // 2)):
                expected[-1] = joined
                continue
        expected.append(Row(len(query.tokens), [query]))
    assert share_prefixes(queries, longest) == expected


@given(sequences)
def test_each_scored_place_sees_its_own_sequence_and_nothing_else(texts: list[list[int]]) -> None:
    queries = make_queries(texts)
    batch = build_batch(lay_out(queries))
    visible, length = find_visible(batch), batch.tokens.shape[1]
    places, targets = iter(batch.scored.tolist()), iter(batch.targets.tolist())
    for index, count in zip(batch.indices, batch.lengths, strict=True):
        query = queries[index]
        for j, target in enumerate(query.targets):
            row, column = divmod(next(places), length)
            seen = visible[row, column].nonzero().flatten().tolist()
            position = len(query.tokens) - count + j
            assert [int(batch.tokens[row, c]) for c in seen] == query.tokens[: position + 1]
            assert [int(batch.positions[row, c]) for c in seen] == list(range(position + 1))
            assert next(targets) == target


@given(sequences, st.integers(1, 200))
def test_batches_take_every_row_once_within_the_budget(texts: list[list[int]], max_tokens: int) -> None:
    rows, start = lay_out(make_queries(texts)), 0
    while start < len(rows):
        batch = take_batch(rows, start, max_tokens)
        assert batch == rows[start : start + len(batch)]
        assert len(batch) == 1 or len(batch) * max(row.length for row in batch) <= max_tokens
        assert len({len(row.queries) > 1 for row in batch}) == 1
        start += len(batch)
    assert start == len(rows)


def test_the_rows_do_not_depend_on_the_order_of_the_requests() -> None:
    texts = [[1, 2, 3, 4, i, 7] for i in range(9)]
    shuffled = make_queries(texts)
    random.Random(0).shuffle(shuffled)
    assert share_prefixes(shuffled, LONGEST) == share_prefixes(make_queries(texts), LONGEST)


def test_requests_that_begin_alike_share_a_row() -> None:
    texts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8], [9, 9, 9, 9], [9, 9, 9, 9]]
    rows = share_prefixes([Query(i, tokens, tokens[-1:]) for i, tokens in enumerate(texts)], 99)
    assert [([q.index for q in row.queries], row.prefix, row.length) for row in rows] == [
        ([0, 1], 5, 8),
        ([2, 3], 4, 4),
    ]
    # of two equal sequences the second has no tokens of its own
    batch = build_batch(rows)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 0, 0, 0, 0]]
    assert batch.branches.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, -1, -1, -1, -1]]


def test_a_branch_sees_the_prefix_and_itself_only() -> None:
    batch = build_batch([Row(2, [Query(0, [1, 2, 3], [4]), Query(1, [1, 2, 5, 6], [7])])])
    rows = ["10000", "11000", "11100", "11010", "11011"]
    assert [["01"[int(seen)] for seen in row] for row in find_visible(batch)[0]] == [list(row) for row in rows]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3]]


def test_a_row_does_not_grow_beyond_the_context() -> None:
    queries = [Query(i, [*range(50), 100 + i, 7], [7]) for i in range(100)]
    rows = share_prefixes(queries, LONGEST)
    assert max(len(row.queries) for row in rows) == 7  # 50 + 7 x 2 tokens
    assert max(row.length for row in rows) == LONGEST


@given(sequences, st.integers(0, 24))
def test_no_row_is_longer_than_allowed_or_than_its_longest_query(texts: list[list[int]], longest: int) -> None:
    rows = share_prefixes(make_queries(texts), longest)
    assert all(row.length <= longest for row in rows if row.can_split)
    assert sorted(q.index for row in rows for q in row.queries) == list(range(len(texts)))
    if longest == 0:
        assert not any(row.can_split for row in rows)


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_changes_nothing_but_its_own_columns(padding: int) -> None:
    row = Row(2, [Query(0, [1, 2, 3], [4]), Query(1, [1, 2, 5, 6], [7])])
    longer = Row(5 + padding, [Query(2, [8] * (5 + padding), [9])])
    alone, together = build_batch([row]), build_batch([row, longer])
    assert torch.equal(find_visible(together)[0, :5, :5], find_visible(alone)[0])
    assert not find_visible(together)[0, :5, 5:].any()
    assert find_visible(together).any(dim=-1).all()  # no softmax is over nothing
