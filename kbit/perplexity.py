"""Cross entropy of a model on fixed, non-overlapping windows of a text (the quantization papers' definition)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64

from kbit.measurement import ItemValues, Measurement, encode_items, measure_mean, transform
from kbit.scorer import NonFiniteError
from kbit.textdata import read_documents

MAX_WINDOW = 2048  # tokens: what quantization papers use; less where the model's context is shorter


@dataclass(frozen=True)
class Windows:
    """A tokenized text, cut into windows.

    Attributes:
        name: of the text.
        sha256: of its uncompressed content.
        tokens: int64 [windows, window length], without overlap; what is left at the end is dropped.
        bytes_per_token: UTF-8 bytes of the text covered by the windows, per token.
    """

    name: str
    sha256: str
    tokens: Int64[torch.Tensor, "windows length"]
    bytes_per_token: float


@dataclass(frozen=True)
class TextScores:
    """What was measured on a text.

    Attributes:
        measurements: cross_entropy (nats per token), bits_per_byte, perplexity.
        items: the cross entropy of each window.
    """

    measurements: list[Measurement]
    items: list[ItemValues]


def make_windows(name: str, tokenizer: Any, *, context: int, max_windows: int | None) -> Windows:
    """Tokenize a text: each document preceded by one end-of-text token, all joined, cut into windows of `context`.

    Raises:
        FileNotFoundError: the text is not there.
        ValueError: the text is shorter than one window.
    """
    documents, sha256 = read_documents(name)
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for document in documents:
        ids += start + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    windows = min(len(ids) // context, max_windows or len(ids))
    if windows == 0:
        raise ValueError(f"text {name!r} has {len(ids)} tokens, less than one window of {context}")
    tokens = torch.tensor(ids[: windows * context]).view(windows, context)
    covered = tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=True)
    return Windows(name, sha256, tokens, len(covered.encode()) / tokens.numel())


@torch.no_grad()
def measure_cross_entropy(model: Any, windows: Windows, *, batch_size: int) -> TextScores:
    """Return the cross entropy in nats per token, in bits per byte, and the perplexity, over all windows.

    In a window of L tokens the last L - 1 are predicted, each from those before it; softmax in float32. The interval is
    over windows, as tokens within one are not independent.

    Raises:
        NonFiniteError: a window's loss is NaN or infinite.
    """
    losses: list[float] = []
    for batch in torch.split(windows.tokens, batch_size):
        tokens = batch.to(model.device)
        logits = model(tokens[:, :-1], use_cache=False).logits.float()
        token_losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        losses += token_losses.mean(dim=1).tolist()
    if not all(math.isfinite(loss) for loss in losses):
        raise NonFiniteError(f"cross entropy on {windows.name!r} is not finite")
    nats = measure_mean(windows.name, "cross_entropy", losses)
    nats_to_bits_per_byte = 1 / (math.log(2) * windows.bytes_per_token)
    in_bits = transform(nats, "bits_per_byte", lambda x: x * nats_to_bits_per_byte)
    measurements = [nats, in_bits, transform(nats, "perplexity", math.exp)]
    return TextScores(measurements, [encode_items(windows.name, "cross_entropy", losses)])
