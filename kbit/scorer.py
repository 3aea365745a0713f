"""Log-likelihoods for lm-eval: an HFLM whose scores are float32, finite, and defined for over-long continuations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]


class NonFiniteError(ArithmeticError):
    """The model gave a NaN or infinite log-likelihood: whatever follows from it is not a measurement."""


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's Hugging Face model with its log-likelihood loop replaced; everything else (generation too) is HFLM's.

    Differences: log-softmax in float32 always; a NaN or Inf raises NonFiniteError instead of becoming an answer; a
    continuation longer than the model's context is scored on its last tokens that fit, where HFLM stops on an
    assertion. Sequences that lose tokens on the left are counted.

    Attributes:
        truncated: requests so far whose context or continuation lost tokens to the model's context length.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self.truncated = 0
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
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for batch in _batches(longest_first, override_bs or int(self.batch_size)):
            for i, score in zip(batch, self._score_batch([requests[i] for i in batch]), strict=True):
                results[i] = score
                self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return results

    def _score_batch(self, requests: list[Request]) -> list[tuple[float, bool]]:
        inputs, targets = zip(*(self._split(context, cont) for _, context, cont in requests), strict=True)
        # Padding on the right needs no mask: under causal attention no scored token sees it.
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in inputs], batch_first=True)
        logits = self._model_call(tokens.to(self.device))
        spans = zip(logits, inputs, targets, strict=True)
        scored = torch.cat([row[len(inp) - len(target) : len(inp)] for row, inp, target in spans]).float()
        target = torch.tensor([t for target in targets for t in target], device=scored.device)
        lengths = [len(target) for target in targets]
        log_likelihoods = -F.cross_entropy(scored, target, reduction="none")
        greedy = scored.argmax(dim=-1) == target
        per_request = zip(torch.split(log_likelihoods, lengths), torch.split(greedy, lengths), requests, strict=True)
        return [(_finite(ll.sum().item(), texts[1]), bool(hit.all())) for ll, hit, (texts, _, _) in per_request]

    def _split(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return the tokens to feed and the tokens to score: the last max_length of the sequence, shifted by one."""
        sequence = context + continuation
        if len(sequence) > self.max_length + 1:
            self.truncated += 1
            sequence = sequence[-(self.max_length + 1) :]
        return sequence[:-1], continuation[-(len(sequence) - 1) :]


def _batches(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _finite(log_likelihood: float, continuation: str) -> float:
    if not math.isfinite(log_likelihood):
        raise NonFiniteError(f"log-likelihood {log_likelihood} for continuation {continuation!r}")
    return log_likelihood
