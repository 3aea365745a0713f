"""Arrange requests in rows of tokens that hold what requests share only once, and cut the rows into batches.

The requests of an item share most of their tokens: four endings of one context, two texts that differ in one word.
Requests whose token sequences begin alike go into one row: the shared prefix once, and then each branch. An attention
mask lets a branch see the prefix and itself, and its positions continue those of the prefix:

    tokens     p0 p1 p2 | a3 a4 | b3 b4 b5
    positions   0  1  2 |  3  4 |  3  4  5

Each sequence is computed as if it were alone, and the prefix is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Int64

_PADDING = -1


@dataclass(frozen=True)
class Query:
    """One request as the model sees it.

    Attributes:
        index: the request's index.
        tokens: the tokens that the model is fed.
        targets: the tokens that are scored, at least one. Target j is predicted at position len(tokens) - len(targets)
            + j.
    """

    index: int
    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Row:
    """Queries with a common beginning: `prefix` tokens that all share, then each query's own."""

    prefix: int
    queries: list[Query]

    @property
    def length(self) -> int:
        """The number of tokens in the row."""
        return self.prefix + sum(len(q.tokens) - self.prefix for q in self.queries)

    @property
    def can_split(self) -> bool:
        """Whether the queries in rows of their own would make shorter rows."""
        return self.length > max(len(q.tokens) for q in self.queries)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right to the longest.

    Attributes:
        tokens: the token of each column, 0 for padding.
        positions: the position of each column's token in its sequence, 0 for padding.
        branches: 0 for the prefix, 1, 2, ... for the queries' own tokens, -1 for padding.
        scored: the places row * length + column that predict the targets, query after query.
        targets: the tokens predicted there.
        indices: the indices of the requests.
        lengths: the number of targets of each request.
    """

    tokens: Int64[torch.Tensor, "rows length"]
    positions: Int64[torch.Tensor, "rows length"]
    branches: Int64[torch.Tensor, "rows length"]
    scored: Int64[torch.Tensor, " targets"]
    targets: Int64[torch.Tensor, " targets"]
    indices: list[int]
    lengths: list[int]

    @property
    def has_branches(self) -> bool:
        """Whether some row holds more than one sequence."""
        return bool(self.branches.max() > 1)


def share_prefixes(queries: Sequence[Query], longest: int) -> list[Row]:
    """Put queries that begin alike into one row, if that saves half of the second query's tokens.

    Sorted as words in a dictionary, queries with a common beginning are neighbours. A row has at most `longest` tokens.
    If its longest query has more, the row may be as long as that query.
    """
    rows: list[Row] = []
    length = 0  # the last row's, which is kept up to date, as thousands of queries may be alike
    for query in sorted(queries, key=lambda q: q.tokens):
        own = len(query.tokens)
        if rows:
            last = rows[-1]
            prefix = min(last.prefix, _common_length(last.queries[-1].tokens, query.tokens))
            # Each query but the first then has to have the tokens that are no longer shared.
            joined = length + (last.prefix - prefix) * (len(last.queries) - 1) + own - prefix
            if joined <= max(length, min(longest, length + own // 2)):
                last.queries.append(query)
                rows[-1], length = Row(prefix, last.queries), joined
                continue
        rows.append(Row(own, [query]))
        length = own
    return rows


def order_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows with branches first, then the others, each by falling length.

    Rows of like length are together, so that there is little padding and a lack of memory shows at once. Rows without
    branches need no mask, which is faster.
    """
    return sorted(rows, key=lambda row: (len(row.queries) == 1, -row.length))


def take_batch(rows: Sequence[Row], start: int, max_tokens: int) -> list[Row]:
    """Return the rows from `start` on, in order_rows' order, that fit into max_tokens tokens, padding counted.

    There is at least one row, and either all rows have branches or none has.
    """
    first = rows[start]
    length, branched = first.length, len(first.queries) > 1
    taken = list(islice(rows, start, start + max(1, max_tokens // length)))
    return [row for row in taken if (len(row.queries) > 1) == branched]


def build_batch(rows: Sequence[Row]) -> Batch:
    """Return the rows as tensors."""
    length = max(row.length for row in rows)
    tokens, positions = np.zeros((2, len(rows), length), dtype=np.int64)
    branches = np.full((len(rows), length), _PADDING, dtype=np.int64)
    scored: list[int] = []
    for r, row in enumerate(rows):
        p, start = row.prefix, row.prefix
        tokens[r, :p], positions[r, :p], branches[r, :p] = row.queries[0].tokens[:p], np.arange(p), 0
        for branch, query in enumerate(row.queries, start=1):
            end = start + len(query.tokens) - p
            tokens[r, start:end], branches[r, start:end] = query.tokens[p:], branch
            positions[r, start:end] = np.arange(p, len(query.tokens))
            scored += (r * length + column for column in _scored_columns(query, p, start))
            start = end
    queries = [query for row in rows for query in row.queries]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(branches),
        torch.tensor(scored),
        torch.tensor([target for query in queries for target in query.targets]),
        [query.index for query in queries],
        [len(query.targets) for query in queries],
    )


def find_visible(batch: Batch) -> Bool[torch.Tensor, "rows length length"]:
    """Return which column (last axis) each column sees: those before it in the prefix or in its own branch, and itself.

    Padding comes last, so that nothing else sees it. It sees the prefix and itself, so that no softmax is over nothing.
    """
    length = batch.tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = batch.branches[:, :, None] == batch.branches[:, None, :]
    return causal & (own | (batch.branches == 0)[:, None, :])


def _scored_columns(query: Query, prefix: int, start: int) -> Iterator[int]:
    """Yield, for each target, the column that predicts it. The query's own tokens begin at column `start`."""
    n = len(query.tokens)
    for position in range(n - len(query.targets), n):
        yield position if position < prefix else start + position - prefix


def _common_length(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences share from the start."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
