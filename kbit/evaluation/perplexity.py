"""How well a model predicts a text, by two definitions that are often confused, and how far it is from its 16 bits.

windows   The text is cut into fixed windows without overlap, and each is predicted from its own beginning, in nats per
          *token*. This is the quantization papers' definition (GPTQ, section 5.1, takes windows of 2,048 tokens.
          kbit.data.hub_texts says of which text).
rolling   Every token of every document is predicted, with as much context as fits, per *word* and byte. This is
          lm-eval's definition.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lm_eval.api.instance import Instance
from torch import nn

from kbit.data.texts import read_documents
from kbit.data.windows import Windows
from kbit.evaluation.logits import compare_heads, score_targets
from kbit.evaluation.measure import Measure, Measured, Subject, check_read
from kbit.evaluation.measurement import (
    ItemValues,
    Measurement,
    NonFiniteError,
    TextRecord,
    encode_items,
    exponentiate,
    measure_mean,
    measure_ratio,
    transform,
)
from kbit.evaluation.rounds.order import TEXT
from kbit.evaluation.scorer import Scorer, splits_at_head
from kbit.evaluation.token_budget import TokenBudget
from kbit.layers.run_time.forwards import sees_whole_input


@dataclass(frozen=True)
class Reference:
    """The 16-bit model on the windows, as its last hidden states. Its logits are computed from them piece by piece.

    The logits themselves would be a vocabulary of numbers for each token, some 50 times as many as the hidden size.

    Attributes:
        hidden: the states [windows, window length - 1, hidden size], see compute_reference.
        head: the 16-bit model's output embedding.
    """

    hidden: Float[torch.Tensor, "windows length hidden"]
    head: nn.Linear


@dataclass(frozen=True)
class TextScores:
    """What was measured on a text.

    Attributes:
        measurements: for windows cross_entropy (nats per token), bits_per_byte and perplexity, and with a reference
            kl_divergence (nats per token) and top1_agreement. For rolling word_cross_entropy (nats per word),
            word_perplexity, byte_perplexity and bits_per_byte. A perplexity that float64 cannot hold is left out.
        items: the cross_entropy, kl_divergence and top1_agreement of each window.
    """

    measurements: list[Measurement]
    items: list[ItemValues]


@dataclass
class KeptStates:
    """The 16-bit model's states on one text. They take gigabytes, so that those of an earlier text are dropped.

    Attributes:
        windows: the windows that the states belong to: the object that Subject.make_windows returned.
        hidden: the states, see Reference.
        reference: what the present variant is compared with.
    """

    windows: Windows | None = None
    hidden: torch.Tensor | None = None
    reference: Reference | None = None


class SampledWindows(dict[tuple[str, tuple[int, ...], bytes], Windows]):
    """Some windows of the texts measured so far, by (hash of the text, shape of all windows, places)."""


class Perplexity(Measure):
    """The cross entropy of a text, and in windows the divergence from the 16-bit model."""

    name = "perplexity"
    fields = ("perplexity", "perplexity_kind", "perplexity_windows")

    def prepare(self, subject: Subject) -> None:
        """Compute the 16-bit model's states on the text, once for all variants that are measured on it.

        Raises:
            OSError: see compute_reference.
            ValueError: see Subject.make_windows.
        """
        kept = subject.memory.recall(KeptStates)
        kept.reference = None
        config = subject.config
        if (
            not subject.sees_original
            or config.perplexity is None
            or config.perplexity_kind != "windows"
            or subject.scorer.path == "hflm"
        ):
            return
        windows = _take_windows(subject)
        if not len(windows.tokens):  # all were measured in earlier rounds
            return
        if kept.hidden is None or kept.windows is not windows:
            kept.windows = kept.hidden = None  # before the space of the next is taken
            hidden = compute_reference(subject.model, windows, subject.scorer.budget)
            kept.windows, kept.hidden = windows, hidden
        kept.reference = Reference(kept.hidden, _keep_head(subject))

    def run(self, subject: Subject) -> Measured:
        """Measure the text of eval.perplexity.

        Raises:
            ValueError: the text was changed while it was read, or see Subject.make_windows.
            NonFiniteError: a loss is NaN or infinite.
        """
        name, scorer = subject.config.perplexity, subject.scorer
        if name is None:
            return Measured()
        sample = subject.sample
        if subject.config.perplexity_kind == "rolling":
            if not sample.is_whole:
                raise ValueError("eval.perplexity_kind=rolling measures whole texts: study.until.decided=false")
            documents, sha256 = read_documents(name)
            check_read(name, subject.names.name_content(name, sha256), subject.identity["perplexity"])
            sent_before = scorer.sent
            scores = measure_rolling(scorer, name, documents)
            text, tokens = TextRecord(name, sha256, len(documents), 0), scorer.sent - sent_before
        else:
            windows, new = subject.make_windows(), _take_windows(subject)
            kept = subject.memory.recall(KeptStates)
            reference, kept.reference = kept.reference, None  # a copied head goes with the variant
            values = score_windows(subject.model, new, scorer.budget, reference) if len(new.tokens) else {}
            if not sample.is_whole:
                values = sample.join(TEXT, windows.name, len(windows.tokens), values)
            scores = measure_windows(windows, values, exactly=not sample.is_last)
            text, tokens = TextRecord(windows.name, windows.sha256, *windows.tokens.shape), new.tokens.numel()
        sampled = sample.describe(TEXT, {text.name: text.windows})
        return Measured(scores.measurements, scores.items, tokens, {"text": text}, sampled=sampled)


def _take_windows(subject: Subject) -> Windows:
    """Return the windows that are to be measured now, which are made once for all variants of the model."""
    windows = subject.make_windows()
    if subject.sample.is_whole:
        return windows
    places = subject.sample.list_new(TEXT, len(windows.tokens))
    kept, wanted = subject.memory.recall(SampledWindows), (windows.sha256, windows.tokens.shape, places.tobytes())
    if wanted not in kept:
        kept[wanted] = dataclasses.replace(windows, tokens=windows.tokens[torch.from_numpy(places)])
    return kept[wanted]


def _keep_head(subject: Subject) -> nn.Linear:
    """Return the 16-bit model's head: the model's own, or a copy if the head is to be quantized."""
    head: nn.Linear = subject.model.get_output_embeddings()
    changes = any(subject.model.get_parameter(name) is head.weight for name in subject.quantized)
    return copy.deepcopy(head) if changes else head


@torch.no_grad()
def compute_reference(
    model: Any, windows: Windows, budget: TokenBudget
) -> Float[torch.Tensor, "windows length hidden"]:
    """Return a model's last hidden states on all tokens of each window but the last, in its dtype, on the CPU.

    The states lie in a temporary file that is mapped into memory, so that a text larger than memory does no harm. The
    file has no name any more and goes with the tensor.

    Raises:
        OSError: the folder of temporary files lacks the space.
    """
    count, length = windows.tokens.shape
    hidden_size = model.get_output_embeddings().weight.shape[1]
    size = count * (length - 1) * hidden_size
    with tempfile.NamedTemporaryFile(prefix="kbit-") as file:
        reserve_space(file, size * model.dtype.itemsize)
        flat = torch.from_file(file.name, shared=True, size=size, dtype=model.dtype)
    hidden = flat.view(count, length - 1, hidden_size)
    for rows, states in iterate_windows(model, windows, budget, lambda rows: run_trunk(model, windows.tokens[rows])):
        hidden[rows] = states.cpu()
    return hidden


def reserve_space(file: Any, size: int) -> None:
    """Take the space of a temporary file at once.

    A mapped page that finds no space later would kill the process (SIGBUS).

    Raises:
        OSError: fewer than `size` bytes are free.
    """
    folder = Path(file.name).parent
    free = shutil.disk_usage(folder).free
    try:
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OSError(
            f"the 16-bit model's states on the text take {size:,} bytes in {folder}, of which {free:,} are free "
            f"({error.strerror}): fewer eval.perplexity_windows, or another folder by TMPDIR"
        ) from error


def measure_cross_entropy(
    model: Any, windows: Windows, budget: TokenBudget, reference: Reference | None = None
) -> TextScores:
    """Measure a model on windows. It does, and raises, what score_windows does."""
    return measure_windows(windows, score_windows(model, windows, budget, reference))


@torch.no_grad()
def score_windows(
    model: Any, windows: Windows, budget: TokenBudget, reference: Reference | None = None
) -> dict[str, list[float]]:
    """Return each metric of each window, and with a reference also how far it is from the 16-bit model.

    In a window of L tokens the last L - 1 are predicted, each from those before it. The softmax is computed in float32.
    Intervals are over windows, as the tokens of one window are not independent.

        kl_divergence = mean over tokens of sum_v p16(v) (log p16(v) - log p(v)),   0 for the 16-bit model itself
        top1_agreement = share of tokens where both models' most likely next token is the same

    Args:
        model: a causal language model. If its logits are not what its head makes of its trunk's states (see
            kbit.evaluation.scorer), the logits are computed as a whole, and there is no reference.
        windows: the text.
        budget: the tokens of each forward pass.
        reference: the 16-bit model on the same windows.

    Raises:
        NonFiniteError: a window's loss or divergence is NaN or infinite.
    """
    if reference is not None or splits_at_head(model):  # a reference is made only of a model that does
        measure = functools.partial(_measure_windows, model, windows, reference)
    else:
        measure = functools.partial(_measure_whole_logits, model, windows)
    values = [of_windows for _, of_windows in iterate_windows(model, windows, budget, measure)]
    names = ["cross_entropy"] if reference is None else ["cross_entropy", "kl_divergence", "top1_agreement"]
    by_metric: dict[str, list[float]] = dict(zip(names, torch.cat(values).T.tolist(), strict=True))
    for metric, of_windows in by_metric.items():
        if not all(math.isfinite(value) for value in of_windows):
            raise NonFiniteError(f"{metric.replace('_', ' ')} on {windows.name!r} is not finite")
    return by_metric


def measure_windows(windows: Windows, by_metric: dict[str, list[float]], *, exactly: bool = False) -> TextScores:
    """Return the means of what score_windows returned, perhaps of some of a text's windows.

    Args:
        windows: all windows of the text.
        by_metric: the values of the measured windows by metric, the cross entropy first.
        exactly: see encode_items.
    """
    nats, *others = (measure_mean(windows.name, metric, of_windows) for metric, of_windows in by_metric.items())
    in_bits = transform(nats, "bits_per_byte", lambda x: x / (math.log(2) * windows.bytes_per_token))
    items = [encode_items(windows.name, metric, values, exactly=exactly) for metric, values in by_metric.items()]
    return TextScores([nats, in_bits, *exponentiate(nats, "perplexity"), *others], items)


def measure_rolling(scorer: Scorer, name: str, documents: Sequence[str]) -> TextScores:
    """Measure a text of this name as lm-eval's rolling log-likelihood tasks do (its wikitext): per word and per byte.

    Every token of a document is predicted, the first one from the end-of-text token. White space separates words.

        word_cross_entropy = -sum log p / words,   word_perplexity = exp(-sum log p / words)
        byte_perplexity = exp(-sum log p / bytes),   bits_per_byte = -sum log p / (bytes ln 2)

    Sums are over all documents. Intervals are over documents, so that a text of one document has none.

    Raises:
        NonFiniteError: a log-likelihood is NaN or infinite.
    """
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(documents)]
    nats = [-log_likelihood for log_likelihood in scorer.loglikelihood_rolling(requests, disable_tqdm=True)]
    words = [len(re.split(r"\s+", text)) for text in documents]
    per_word = measure_ratio(name, "word_cross_entropy", nats, words)
    per_byte = measure_ratio(name, "byte_cross_entropy", nats, [len(text.encode()) for text in documents])
    measurements = [
        per_word,
        *exponentiate(per_word, "word_perplexity"),
        *exponentiate(per_byte, "byte_perplexity"),
        transform(per_byte, "bits_per_byte", lambda x: x / math.log(2)),
    ]
    return TextScores(measurements, [])


def _measure_windows(model: Any, windows: Windows, reference: Reference | None, rows: slice) -> torch.Tensor:
    """Return each window's mean loss, and with a reference its divergence and agreement [windows, 1 or 3]."""
    tokens = windows.tokens[rows].to(model.device)
    hidden, targets = run_trunk(model, tokens).flatten(0, 1), tokens[:, 1:].flatten()
    head = model.get_output_embeddings()
    if reference is None:
        places = torch.arange(len(targets), device=model.device)
        columns = [-score_targets(head, hidden, places, targets)[0]]
    else:
        baseline = reference.hidden[rows].flatten(0, 1).to(model.device)
        log_p, divergence, agreement = compare_heads(head, hidden, reference.head, baseline, targets)
        columns = [-log_p, divergence, agreement]
    values = torch.stack([column.double() for column in columns], dim=-1)
    means = values.view(*tokens[:, 1:].shape, -1).mean(dim=1)
    means[:, 1:].clamp_(min=0)  # sums in float32 make a divergence of nearly equal models less than the 0 that it is
    return means.cpu()


def _measure_whole_logits(model: Any, windows: Windows, rows: slice) -> torch.Tensor:
    """Return the mean loss of each window [windows, 1], from the logits as the model itself gives them."""
    tokens = windows.tokens[rows].to(model.device)
    logits = model(tokens[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.double().mean(dim=1, keepdim=True).cpu()


def run_trunk(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states of tokens [windows, L], without the last token of each window."""
    hidden: torch.Tensor = model.base_model(tokens[:, :-1].to(model.device), use_cache=False).last_hidden_state
    return hidden


def iterate_windows(
    model: nn.Module, windows: Windows, budget: TokenBudget, function: Callable[[slice], torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, what the function returns for these rows), for as many windows at once as the budget has tokens for.

    If the windows of a batch would affect each other in the model, they go one at a time, whatever the budget.
    """
    count, length = windows.tokens.shape
    one_by_one = sees_whole_input(model)
    done = 0
    while done < count:
        at_once = 1 if one_by_one else max(1, budget.tokens // length)
        rows = slice(done, min(count, done + at_once))
        result = budget.attempt(functools.partial(function, rows), can_split=rows.stop - rows.start > 1)
        if result is not None:
            yield rows, result
            done = rows.stop
