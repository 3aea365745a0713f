"""lm-eval's Hugging Face model with a public method where it has a private one, so that only this file knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

Request = tuple[Any, list[int], list[int]]  # (context, continuation), tokens of the context, of the continuation


class OpenHFLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model. A subclass may score tokens in its own way: every log-likelihood comes from score_tokens."""

    def score_tokens(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding would give it) for each request."""
        return self.score_tokens_by_hflm(requests)

    def score_tokens_by_hflm(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return what score_tokens does by lm-eval's own loop, all requests at once."""
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=len(requests)
        )
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return self.score_tokens(requests)
