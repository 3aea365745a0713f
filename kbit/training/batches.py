"""The text of a training: documents as one stream of tokens, and the batches that are drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64

from kbit.training.config import MAX_STEPS
from kbit.training.held_out import count_held

Tokens = Int64[torch.Tensor, " tokens"]


def tokenize_stream(documents: Iterable[str], tokenizer: Any) -> Tokens:
    """Return all documents as one stream, each preceded by one end-of-text token."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.eos_token_id, *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def draw_batch(
    stream: Tokens, step: int, *, seed: int, batch_size: int, context: int
) -> Int64[torch.Tensor, "batch context"]:
    """Return `batch_size` windows of `context` consecutive tokens at random places.

    The places depend on seed and step alone, so that a resumed training draws what an undisturbed one would.
    """
    generator = torch.Generator().manual_seed(seed * MAX_STEPS + step)
    starts = torch.randint(len(stream) - context + 1, (batch_size, 1), generator=generator)
    return stream[starts + torch.arange(context)]


@dataclass(frozen=True)
class TrainingText:
    """A text as tokens, in a part to train on and windows from its end that are held back.

    Attributes:
        stream: the tokens to train on.
        held: windows [windows, context] that no batch has a token of.
    """

    stream: Tokens
    held: Int64[torch.Tensor, "windows context"]


def split_text(stream: Tokens, *, batch_size: int, context: int, name: str) -> TrainingText:
    """Hold back windows from the end of a stream, see count_held.

    Raises:
        ValueError: what is left has fewer tokens than a batch.
    """
    held = count_held(len(stream) // context)
    kept = len(stream) - held * context
    if kept < batch_size * context:
        raise ValueError(
            f"train.text={name!r} has {len(stream)} tokens, of which {held * context} are held back: the rest is less "
            f"than one batch of {batch_size} windows of {context} (train.batch_size, train.context)"
        )
    return TrainingText(stream[:kept], stream[kept:].view(held, context))
