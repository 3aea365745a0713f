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
        bytes_per_token: the UTF-8 bytes of the documents' text that the windows cover, per token. They are counted in
            the text itself: what the tokens decode to lacks literal special tokens and what a tokenizer does not know.
            All tokens count, also the first of each window, which is not scored, and the end-of-text tokens before the
            documents, which have no bytes. bits_per_byte, nats per scored token / (ln 2 bytes_per_token), takes scored
            tokens to be as long as all are.
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
    parts = _tokenize(documents, tokenizer, None if max_windows is None else max_windows * context)
    ids = [token for part in parts for token in part.ids]
    windows = len(ids) // context if max_windows is None else min(max_windows, len(ids) // context)
    if windows == 0:
        raise ValueError(f"text {name!r} has {len(ids)} tokens, less than one window of {context}")
    tokens = torch.tensor(ids[: windows * context]).view(windows, context)
    return Windows(name, sha256, tokens, _count_bytes(parts, tokenizer, tokens.numel()) / tokens.numel())


@dataclass(frozen=True)
class _Part:
    """A document, or the start of a long one, as tokens.

    Attributes:
        text: what was tokenized.
        ids: its tokens after an end-of-text token. Those at the end of a cut text are missing.
        starts: the number of end-of-text tokens, 0 or 1.
        is_cut: whether the document goes on.
    """

    text: str
    ids: list[int]
    starts: int
    is_cut: bool


def _tokenize(documents: Sequence[str], tokenizer: Any, limit: int | None) -> list[_Part]:
    """Return the tokens of all documents, or with a limit of the first ones, at least so many tokens."""
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts: list[_Part] = []
    count = 0
    for document in documents:
        if limit is not None and count >= limit:
            break
        parts.append(_tokenize_start(document, tokenizer, start, limit and limit - count))
        count += len(parts[-1].ids)
    return parts


def _tokenize_start(text: str, tokenizer: Any, start: list[int], limit: int | None) -> _Part:
    """Return a text as tokens, with a limit at least the first so many. Only the start of a long text is read.

    A cut changes the tokens beside it, not those before: tokenizers split at white space first, or merge neighbours.
    """
    length = len(text) if limit is None else _CHARACTERS_PER_TOKEN * (limit + _MARGIN)
    while True:
        ids: list[int] = _encode(text[:length], tokenizer)["input_ids"]
        if length >= len(text):
            return _Part(text, start + ids, len(start), is_cut=False)
        if limit is not None and len(ids) >= limit + _MARGIN:
            return _Part(text[:length], start + ids[:-_MARGIN], len(start), is_cut=True)
        length *= 2


def _encode(text: str, tokenizer: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False)


def _count_bytes(parts: Sequence[_Part], tokenizer: Any, tokens: int) -> int:
    """Return the UTF-8 bytes of the text that the first so many tokens stand for."""
    total = 0
    for part in parts:
        if tokens <= 0:
            break
        is_whole = tokens >= len(part.ids) and not part.is_cut
        text = part.text if is_whole else part.text[: _find_end(part, tokenizer, tokens - part.starts)]
        total += len(text.encode())
        tokens -= len(part.ids)
    return total


def _find_end(part: _Part, tokenizer: Any, tokens: int) -> int:
    """Return where in a part's text its first so many tokens end, in characters.

    A tokenizer written in Python does not say. There every token of the text is taken to be as long as all are.
    """
    if tokens <= 0:
        return 0
    encoded = _encode(part.text, tokenizer)
    count = len(encoded["input_ids"])
    if not getattr(encoded, "is_fast", False):
        return round(len(part.text) * tokens / count)
    span = next((span for i in range(tokens - 1, -1, -1) if (span := encoded.token_to_chars(i)) is not None), None)
    return 0 if span is None else int(span.end)
