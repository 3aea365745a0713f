"""Texts as tokens, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Int64

from kbit.data.texts import read_documents

_MARGIN: Final = 64  # so many tokens at a cut may differ from those of the whole text
_CHARACTERS_PER_TOKEN: Final = 8  # more than the usual 3 to 5 of a tokenizer, so that one attempt is enough


@dataclass(frozen=True)
class Windows:
    """A tokenized text, cut into windows.

    Attributes:
        name: the text's name.
        sha256: the hash of the text's uncompressed content.
        tokens: int64 [windows, window length]. Windows do not overlap, and what is left at the end is dropped.
        bytes_per_token: the UTF-8 bytes of the text that the windows cover, per token. All tokens count, also the first
            of each window, which is not scored, and the end-of-text tokens, which have no bytes. bits_per_byte, nats
            per scored token / (ln 2 bytes_per_token), takes scored tokens to be as long as all are.
    """

    name: str
    sha256: str
    tokens: Int64[torch.Tensor, "windows length"]
    bytes_per_token: float


def make_windows(name: str, tokenizer: Any, *, context: int, max_windows: int | None) -> Windows:
    """Tokenize a text, put one end-of-text token before each document, join all, and cut windows of `context` tokens.

    Raises:
        FileNotFoundError: the text is not there.
        ValueError: the text is shorter than one window.
    """
    documents, sha256 = read_documents(name)
    ids = _tokenize(documents, tokenizer, None if max_windows is None else max_windows * context)
    windows = len(ids) // context
    if windows == 0:
        raise ValueError(f"text {name!r} has {len(ids)} tokens, less than one window of {context}")
    tokens = torch.tensor(ids[: windows * context]).view(windows, context)
    covered = tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=True)
    return Windows(name, sha256, tokens, len(covered.encode()) / tokens.numel())


def _tokenize(documents: Sequence[str], tokenizer: Any, limit: int | None) -> list[int]:
    """Return the token ids of all documents, each after an end-of-text token, or with a limit the first so many."""
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for document in documents:
        if limit is not None and len(ids) >= limit:
            break
        ids += start + _tokenize_start(document, tokenizer, limit and limit - len(ids))
    return ids[:limit]


def _tokenize_start(text: str, tokenizer: Any, limit: int | None) -> list[int]:
    """Return a text's token ids, with a limit at least the first so many. Only the start of a long text is read.

    A cut changes the tokens beside it, not those before: tokenizers split at white space first, or merge neighbours.
    """
    length = len(text) if limit is None else _CHARACTERS_PER_TOKEN * (limit + _MARGIN)
    while True:
        ids: list[int] = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text):
            return ids
        if limit is not None and len(ids) >= limit + _MARGIN:
            return ids[:-_MARGIN]
        length *= 2
