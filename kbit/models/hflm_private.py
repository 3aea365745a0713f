"""lm-eval's Hugging Face model with a public method where it has a private one, so that only this file knows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

from kbit.models.inference import in_evaluation_mode

Request = tuple[Any, list[int], list[int]]  # (context, continuation), tokens of the context, of the continuation


class OpenHFLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model. A subclass may score tokens in its own way: every log-likelihood comes from score_tokens.

    The model is as it was afterwards. lm-eval would tie the output embedding to the input embedding where the
    configuration says so, and leave the model in evaluation mode.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        """Prepare a loaded model. lm-eval gives a tokenizer without a padding token one: it gets a copy of those."""
        tokenizer = copy.deepcopy(tokenizer) if getattr(tokenizer, "pad_token", None) is None else tokenizer
        with in_evaluation_mode(model), _never_tied(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, **options)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return lm-eval's generated answer to each request."""
        with in_evaluation_mode(self.model):
            answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return answers

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


@contextmanager
def _never_tied(model: Any) -> Iterator[None]:
    """Let the model's tie_weights do nothing for a while."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
