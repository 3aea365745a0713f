"""Log-likelihoods for lm-eval: an HFLM whose scores are float32, finite, and computed once for shared beginnings.

Three things make the scorer fast. What the answers of an item share is computed once (see
kbit.evaluation.prefix_sharing). Logits are computed at the scored places only. A task's tokens and rows are made once
and kept for every variant of the model. How a model is scored is its `path`, the first of these that is known to be
right for the model:

    prefix sharing        for architectures that tests hold equal to one sequence per row, if every layer has full
                          attention and no product sees more than one token (int8 methods do, see
                          kbit.methods.llm_int8)
    one sequence per row  for models whose logits are the output embedding of the trunk's last hidden state, bit for
                          bit, on a probe
    hflm                  for any other model: lm-eval's own loop

A model with a product that sees more than one token is scored one row at a time, whatever the batch size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from lm_eval.api.instance import Instance
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbit.evaluation.config import TOKENS_PER_SEQUENCE
from kbit.evaluation.logits import score_targets
from kbit.evaluation.measurement import NonFiniteError
from kbit.evaluation.prefix_sharing import (
    Batch,
    Query,
    Row,
    build_batch,
    find_visible,
    order_rows,
    share_prefixes,
    take_batch,
)
from kbit.evaluation.token_budget import TokenBudget
from kbit.layers.run_time.forwards import sees_whole_input
from kbit.models.architectures import check_ids
from kbit.models.hflm_private import OpenHFLM, Request
from kbit.models.inference import check_causal, in_evaluation_mode

Asked = tuple[tuple[str, str], ...]  # the texts of the requests of one call

# Architectures (config.model_type) whose models take a 4-D attention mask and positions of ours.
PREFIX_SHARING: Final = frozenset(
    {"bloom", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "qwen2", "qwen3"}
)

# A row of several sequences has at most so many tokens. Its attention mask grows with their square: a pair of tokens
# takes 4 bytes in float32, and 4 bytes of truth values while the mask is made, 130 MB in all.
LONGEST_SHARED_ROW: Final = 4096
_PROBE: Final = 8  # tokens


@dataclass
class Arrangement:
    """The requests of one call, arranged in rows, and what is recorded of them.

    Attributes:
        requests: the requests as tokens.
        queries: what the model is fed for each request.
        made_for: the scorer's path, and how long rows may be (see Scorer._limit_rows).
        rows: the rows, which are made anew when made_for changes.
        truncated: the number of requests that lost tokens to the model's context length.
        first_tokens: the first request as it is sent to the model.
    """

    requests: list[Request]
    queries: list[Query]
    made_for: tuple[str, int]
    rows: list[Row]
    truncated: int
    first_tokens: tuple[int, ...]


class Scorer(OpenHFLM):
    """lm-eval's Hugging Face model with a log-likelihood loop of our own. Everything else (generation too) is HFLM's.

    The loop differs from HFLM's in four ways. The log-softmax is always computed in float32. A NaN or Inf raises
    NonFiniteError instead of becoming an answer. A continuation longer than the model's context is scored on its last
    tokens that fit, where HFLM stops on an assertion. There is no cache of logits, which lm-eval reads at wrong places
    for equal tokens that are split differently.

    Attributes:
        budget: the tokens of a forward pass, which are halved when memory runs out.
        truncated: the number of requests so far that lost tokens to the model's context length.
        sent: the number of tokens of all requests so far, where each request counts the beginning that it shares.
        first_tokens: the context and continuation of the first request of the last call, as sent to the model.
        tokens: the tokens of the requests asked so far. Scorers of one identify_tokenizer() may share them.
        last_arrangement: the requests of the last call in rows.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        """Prepare to score a model.

        Raises:
            ValueError: the model is not causal.
        """
        super().__init__(model, tokenizer, batch_size=batch_size, softmax_dtype=torch.float32, logits_cache=False)
        if not self._is_row_by_row:  # there texts affect each other on purpose
            check_causal(model)
        with in_evaluation_mode(model):
            self._path = _choose_path(model)
        self._set_budget(batch_size)
        self.truncated = 0
        self.sent = 0
        self.first_tokens: tuple[int, ...] = ()
        self.tokens: dict[Asked, list[Request]] = {}
        self._arrangements: dict[Asked, Arrangement] = {}
        self.last_arrangement = Arrangement([], [], ("", 0), [], 0, ())

    @property
    def path(self) -> str:
        """The way in which the model, as it is quantized now, is scored (see the module)."""
        return "one sequence per row" if self._path == "prefix sharing" and self._is_row_by_row else self._path

    @property
    def batch_tokens(self) -> int:
        """The number of tokens of a forward pass. 1 means a row at a time."""
        return 1 if self._is_row_by_row else self.budget.tokens

    @property
    def batch_size(self) -> int:
        """The number of sequences that HFLM generates at once."""
        return 1 if self._is_row_by_row else self.batch_size_per_gpu

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS where there is none.

        Raises:
            ValueError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(
            f"the tokenizer of {self.tokenizer.name_or_path} has neither a BOS nor an EOS token, one of which begins a "
            "text without context: give another one by model.tokenizer"
        )

    @property
    def _is_row_by_row(self) -> bool:
        """Whether texts in one forward pass would affect each other. It is asked anew, as the model may change."""
        return sees_whole_input(self.model)

    def set_batch_size(self, batch_size: int) -> None:
        """Set the budget of tokens of a forward pass, and the sequences that are generated at once.

        The same batch size as before keeps a budget that a lack of memory halved.
        """
        if batch_size != self.batch_size_per_gpu:
            self._set_budget(batch_size)

    def _set_budget(self, batch_size: int) -> None:
        self.batch_size_per_gpu: int = batch_size  # HFLM's
        self.budget = TokenBudget(batch_size * TOKENS_PER_SEQUENCE[self.device.type])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of each request, and keep tokens and rows for the next call that asks it."""
        asked = tuple(instance.args for instance in requests)
        if asked in self._arrangements:
            return self._score(self._arrangements[asked])
        scores: list[tuple[float, bool]]
        if asked in self.tokens:
            scores = self.score_tokens(self.tokens[asked])
        else:
            scores = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            self.tokens[asked] = self.last_arrangement.requests
        self._arrangements[asked] = self.last_arrangement
        return scores

    def identify_tokenizer(self) -> str:
        """Return what decides the tokens of a text. It is empty for a tokenizer written in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return ""
        settings = f"{self.prefix_token_id} {self.add_bos_token} "
        return hashlib.sha256((settings + backend.to_str()).encode()).hexdigest()

    def score_tokens(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding would give it) for each request.

        Raises:
            ValueError: a request with nothing to score.
            NonFiniteError: a log-likelihood is NaN or infinite.
        """
        self.last_arrangement = self._arrange(list(requests))
        return self._score(self.last_arrangement)

    def _arrange(self, requests: list[Request]) -> Arrangement:
        """Cut each request to what fits and arrange them in rows."""
        longest = self.max_length
        queries = [_cut(i, context + rest, rest, longest) for i, (_, context, rest) in enumerate(requests)]
        check_ids(self.model, self.tokenizer, max((max(query.tokens, default=0) for query in queries), default=0))
        for request, query in zip(requests, queries, strict=True):
            if not query.targets:
                raise ValueError(f"request {request[0]!r} has no token to score")
        truncated = sum(len(c) + len(k) > longest + 1 for _, c, k in requests)
        first = (*queries[0].tokens, queries[0].targets[-1]) if queries else ()
        made_for = (self.path, self._limit_rows(queries))
        return Arrangement(requests, queries, made_for, self._make_rows(queries), truncated, first)

    def _limit_rows(self, queries: list[Query]) -> int:
        """Return how long a row of several queries may be: the budget, or twice the longest query, which has to fit.

        The length is halved with the budget when memory runs out.
        """
        halvings = self.budget.halvings
        needed = 2 * max((len(query.tokens) for query in queries), default=0) >> halvings
        return min(min(int(self.max_length), LONGEST_SHARED_ROW) >> halvings, max(self.budget.tokens, needed))

    def _make_rows(self, queries: list[Query]) -> list[Row]:
        if self.path == "prefix sharing":
            return order_rows(share_prefixes(queries, self._limit_rows(queries)))
        return order_rows([Row(len(query.tokens), [query]) for query in queries])

    def _score(self, arrangement: Arrangement) -> list[tuple[float, bool]]:
        """Score an arrangement's rows batch by batch. When memory runs out, make smaller batches of shorter rows."""
        if arrangement.made_for != (now := (self.path, self._limit_rows(arrangement.queries))):
            arrangement.made_for, arrangement.rows = now, self._make_rows(arrangement.queries)
        self.truncated += arrangement.truncated
        self.sent += sum(len(query.tokens) for query in arrangement.queries)
        self.first_tokens = arrangement.first_tokens
        results: list[tuple[float, bool]] = [(0.0, False)] * len(arrangement.requests)
        todo, done = arrangement.rows, 0
        one_by_one = self._is_row_by_row  # asked once, as the answer goes through the whole model
        while done < len(todo):
            rows = take_batch(todo, done, 1 if one_by_one else self.budget.tokens)
            can_split = len(rows) > 1 or rows[0].can_split
            with in_evaluation_mode(self.model):
                scores = self.budget.attempt(functools.partial(self._score_rows, rows), can_split=can_split)
            if scores is None:
                todo, done = self._make_rows([query for row in todo[done:] for query in row.queries]), 0
                continue
            done += len(rows)
            for index, log_likelihood, greedy in scores:
                text = arrangement.requests[index][0]
                if not math.isfinite(log_likelihood):
                    raise NonFiniteError(f"log-likelihood {log_likelihood} for request {text!r}")
                results[index] = (log_likelihood, greedy)
                if text is not None:  # a window of a rolling log-likelihood has no text
                    self.cache_hook.add_partial("loglikelihood", text, results[index])
        return results

    @torch.no_grad()
    def _score_rows(self, rows: list[Row]) -> list[tuple[int, float, bool]]:
        """Return (request, log-likelihood, greedy) for each query of the rows, from one forward pass."""
        if self._path == "hflm":
            return self._score_by_hflm(rows)
        batch = build_batch(rows)
        # Branches predict their first token from one place and differ only in a few words: each place is taken once.
        scored, places = torch.unique(batch.scored.to(self.device), return_inverse=True)
        hidden = _run_trunk(self.model, batch).flatten(0, 1)[scored]
        head = self.model.get_output_embeddings()
        log_likelihoods, hits = score_targets(head, hidden, places, batch.targets.to(self.device))
        starts = np.cumsum([0, *batch.lengths[:-1]])
        sums = np.add.reduceat(log_likelihoods.double().cpu().numpy(), starts)
        greedy = np.logical_and.reduceat(hits.cpu().numpy(), starts)
        return list(zip(batch.indices, sums.tolist(), greedy.tolist(), strict=True))

    def _score_by_hflm(self, rows: list[Row]) -> list[tuple[int, float, bool]]:
        """Score rows of one query each by lm-eval's own loop."""
        queries = [query for row in rows for query in row.queries]
        requests = [(None, q.tokens[: len(q.tokens) - len(q.targets) + 1], q.targets) for q in queries]
        scores = self.score_tokens_by_hflm(requests)
        return [(query.index, *score) for query, score in zip(queries, scores, strict=True)]


@torch.no_grad()
def splits_at_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the trunk's last hidden state, bit for bit, on a few tokens.

    They are not if something follows the head (a soft cap, a scale) or if the model is built in another way.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        return False
    probe = torch.arange(_PROBE, device=model.device)[None] % head.weight.shape[0]
    hidden = getattr(model.base_model(probe, use_cache=False), "last_hidden_state", None)
    return hidden is not None and torch.equal(head(hidden), model(probe, use_cache=False).logits)


def _choose_path(model: Any) -> str:
    """Return the path by which the model can be scored, see the module."""
    config = model.config
    if not splits_at_head(model):
        return "hflm"
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type in PREFIX_SHARING and full and getattr(config, "sliding_window", None) is None:
        return "prefix sharing"
    return "one sequence per row"


def _cut(index: int, tokens: list[int], continuation: list[int], longest: int) -> Query:
    """Cut a request to what fits: its last `longest` + 1 tokens. All of them but the last are fed to the model."""
    tokens = tokens[-(longest + 1) :]
    return Query(index, tokens[:-1], continuation[-(len(tokens) - 1) :])


def _run_trunk(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last hidden states [rows, length, hidden size] of a batch."""
    tokens = batch.tokens.to(model.device)
    if not batch.has_branches:  # padding on the right needs no mask, as under causal attention no scored place sees it
        hidden: torch.Tensor = model.base_model(tokens, use_cache=False).last_hidden_state
        return hidden
    visible = find_visible(batch)[:, None].to(model.device)
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    positions = batch.positions.to(model.device)
    if model.config.model_type == "bloom":
        with _alibi_of(model.base_model, positions):
            hidden = model.base_model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
    else:
        hidden = model.base_model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    return hidden


@contextlib.contextmanager
def _alibi_of(trunk: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let BLOOM, which takes no position_ids, build its position bias from positions [rows, length] of ours.

    Its bias is slope_h * position of the key, the same for every query. As softmax(x + c) = softmax(x), that is equal
    to slope_h times the distance (Press et al. 2022), so that a key in a branch needs its own position only.
    """

    def build_alibi(mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        two_keys = torch.ones(1, 2, dtype=torch.long, device=mask.device)
        alibi: torch.Tensor = type(trunk).build_alibi_tensor(trunk, two_keys, heads, torch.float32)
        slopes = alibi[:, :, 1]  # at position 1: [heads, 1]
        return (slopes * positions[:, None]).flatten(0, 1)[:, None].to(dtype)

    trunk.build_alibi_tensor = build_alibi
    try:
        yield
    finally:
        del trunk.build_alibi_tensor
