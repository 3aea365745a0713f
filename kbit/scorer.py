"""Log-likelihoods for lm-eval: an HFLM whose scores are float32, finite, and computed once for shared beginnings.

The requests of an item share most of their tokens: four endings of one context, two texts that differ in one word. Here
requests whose token sequences begin alike are laid out in one row, the shared prefix once and then each branch, with an
attention mask that lets a branch see the prefix and itself, and positions that continue the prefix:

    tokens     p0 p1 p2 | a3 a4 | b3 b4 b5
    positions   0  1  2 |  3  4 |  3  4  5

so each sequence is computed as if it were alone, and the prefix once. Architectures that take their positions from the
attention mask (BLOOM's ALiBi), or that are not tested with such masks, get one sequence in each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]

# Architectures (config.model_type) whose models take a 4-D attention mask and explicit positions; tests hold them equal
# to one sequence per row.
PREFIX_SHARING: Final = frozenset({"gpt_neox", "gpt2", "opt", "llama", "mixtral"})


class NonFiniteError(ArithmeticError):
    """The model gave a NaN or infinite log-likelihood: whatever follows from it is not a measurement."""


@dataclass(frozen=True)
class _Sequence:
    """One request as the model sees it.

    Attributes:
        index: of the request.
        tokens: fed to the model.
        targets: scored; target j is predicted at position len(tokens) - len(targets) + j.
    """

    index: int
    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True)
class _Row:
    """Sequences with a common beginning: `prefix` tokens shared by all, then each one's own."""

    prefix: int
    sequences: list[_Sequence]

    @property
    def length(self) -> int:
        return self.prefix + sum(len(s.tokens) - self.prefix for s in self.sequences)


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's Hugging Face model with its log-likelihood loop replaced; everything else (generation too) is HFLM's.

    Differences: shared beginnings are computed once; log-softmax in float32 always; a NaN or Inf raises NonFiniteError
    instead of becoming an answer; a continuation longer than the model's context is scored on its last tokens that fit,
    where HFLM stops on an assertion. Sequences that lose tokens on the left are counted.

    Attributes:
        truncated: requests so far whose context or continuation lost tokens to the model's context length.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        before = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        if before != [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]:
            raise ValueError(
                "lm-eval tied weights of the model that were not tied (its lm_head, quantized on its own?): "
                "set model.config.tie_word_embeddings=False before evaluating"
            )
        self.truncated = 0
        self._shares_prefixes = _can_share_prefixes(model.config)
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize a request as HFLM does, once: the variants of a model share its tokenizer."""
        pair = (context, continuation)
        if pair not in self._encoded:
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding would give it) for each request."""
        sequences = [self._split(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)]
        batch_size = override_bs or int(self.batch_size)
        # A row is at most as long as the model's context and holds at most a batch, however much all requests share.
        rows = _share_prefixes(sequences, batch_size if self._shares_prefixes else 1, self.max_length)
        rows.sort(key=lambda row: -row.length)  # like lengths together: little padding; out of memory shows at once
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in _batches(rows, batch_size):
            for index, log_likelihood, greedy in self._score_rows(batch):
                if not math.isfinite(log_likelihood):
                    raise NonFiniteError(f"log-likelihood {log_likelihood} for request {requests[index][0]!r}")
                results[index] = (log_likelihood, greedy)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return results

    def _split(self, index: int, context: list[int], continuation: list[int]) -> _Sequence:
        """Cut a request to what fits: the last max_length tokens are fed, each of which predicts the next."""
        tokens = context + continuation
        if len(tokens) > self.max_length + 1:
            self.truncated += 1
            tokens = tokens[-(self.max_length + 1) :]
        return _Sequence(index, tokens[:-1], continuation[-(len(tokens) - 1) :])

    @torch.no_grad()
    def _score_rows(self, rows: list[_Row]) -> Iterator[tuple[int, float, bool]]:
        """Yield (request, log-likelihood, greedy) for each sequence of the rows, in one forward pass."""
        arguments = {} if all(len(row.sequences) == 1 for row in rows) else _branch_arguments(rows, self.model.dtype)
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(_row_tokens(row)) for row in rows], batch_first=True)
        # Without branches padding on the right needs no mask: under causal attention no scored token sees it.
        inputs = {"input_ids": tokens, **arguments}
        output = self.model(**{name: value.to(self.device) for name, value in inputs.items()}, use_cache=False)
        places = [(r, column) for r, row in enumerate(rows) for column in _scored_columns(row)]
        at = torch.tensor(places, device=self.device).T
        logits = output.logits[at[0], at[1]].float()
        sequences = [sequence for row in rows for sequence in row.sequences]
        targets = torch.tensor([t for s in sequences for t in s.targets], device=self.device)
        log_likelihoods = -F.cross_entropy(logits, targets, reduction="none")
        lengths = [len(s.targets) for s in sequences]
        hits = torch.split(logits.argmax(dim=-1) == targets, lengths)
        for sequence, scores, hit in zip(sequences, torch.split(log_likelihoods, lengths), hits, strict=True):
            yield sequence.index, scores.double().sum().item(), bool(hit.all())


def _can_share_prefixes(config: Any) -> bool:
    """Whether a mask of ours may replace the model's own: a tested architecture with full attention in every layer."""
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in PREFIX_SHARING and full and getattr(config, "sliding_window", None) is None


def _share_prefixes(sequences: list[_Sequence], most: int, longest: int) -> list[_Row]:
    """Put sequences that begin alike into one row, if that saves half of the second's tokens.

    A row gets at most `most` sequences and, with more than one, `longest` tokens.

    Sorted as words in a dictionary, sequences with a common beginning are neighbours.
    """
    rows: list[_Row] = []
    for sequence in sorted(sequences, key=lambda s: s.tokens):
        if rows:
            last = rows[-1]
            shared = _common_length(last.sequences[-1].tokens, sequence.tokens)
            prefix = min(shared, last.prefix)
            joined = _Row(prefix, [*last.sequences, sequence])
            saves = joined.length < last.length + len(sequence.tokens) // 2
            if saves and len(joined.sequences) <= most and joined.length <= longest:
                rows[-1] = joined
                continue
        rows.append(_Row(len(sequence.tokens), [sequence]))
    return rows


def _common_length(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences share from the start."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


def _row_tokens(row: _Row) -> list[int]:
    """Return the prefix, then each sequence's own tokens."""
    own = [token for s in row.sequences for token in s.tokens[row.prefix :]]
    return row.sequences[0].tokens[: row.prefix] + own


def _scored_columns(row: _Row) -> Iterator[int]:
    """Yield, for each target of each sequence, the column of the row that predicts it."""
    start = row.prefix
    for sequence in row.sequences:
        n = len(sequence.tokens)
        for position in range(n - len(sequence.targets), n):
            yield position if position < row.prefix else start + position - row.prefix
        start += n - row.prefix


def _branch_arguments(rows: list[_Row], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the attention mask [rows, 1, length, length] (0 or the least number) and the positions [rows, length]."""
    length = max(row.length for row in rows)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no empty softmax
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        p, start = row.prefix, row.prefix
        visible[r, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        positions[r, :p] = torch.arange(p)
        for sequence in row.sequences:
            n = len(sequence.tokens) - p
            visible[r, start : start + n, :p] = True
            visible[r, start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
            positions[r, start : start + n] = torch.arange(p, p + n)
            start += n
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}


def _batches(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Cut the rows into batches of about `size` sequences."""
    batch: list[_Row] = []
    for row in rows:
        if batch and sum(len(r.sequences) for r in batch) + len(row.sequences) > size:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
