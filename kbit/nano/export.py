"""Writes a trained nano model as a Hugging Face folder: float16 safetensors, tokenizer, losses and a model card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kbit.data.windows import make_windows
from kbit.evaluation.measurement import Measurement
from kbit.evaluation.perplexity import measure_cross_entropy
from kbit.evaluation.token_budget import TokenBudget
from kbit.methods.report import plan_quantization
from kbit.models.loading import LoadedModel, load_model
from kbit.nano.architectures import CONTEXT
from kbit.numerics.spec import QuantSpec

HELD_OUT_WINDOWS = 256
SHIPPED_TEXT = (2772, 6_758_744)  # documents and tokens of the text that the shipped models were trained on
_SHIPPED_DATA = """public-domain children's books from
Project Gutenberg and two parts of TinyStories (CDLA-Sharing-1.0). Held out: The Jungle Book, The Wind in the Willows,
The Wonderful Wizard of Oz, The Happy Prince. Some of the books are from 1830 to 1922 and carry attitudes of their time,
which the model may repeat."""
_OWN_DATA = """a text of your own, of which
this card knows no more: say here what it is, and under which licence. Held out, by file name: the four books of the
embedded text nano_held_out."""


@dataclass(frozen=True)
class Training:
    """How a model was made, for its card.

    Attributes:
        name: name of the model.
        content: the part of the configuration that decided the weights.
        tokens: number of tokens seen in training, repeats counted.
        stream_tokens: number of tokens of the training text.
        documents: number of documents of the training text.
        cpu_seconds: CPU time spent in the training loop.
        losses: CSV file of the training losses.
        options: options of the command line: family, size and those that are not at their default.
    """

    name: str
    content: dict[str, Any]
    tokens: int
    stream_tokens: int
    documents: int
    cpu_seconds: float
    losses: Path
    options: dict[str, Any]


def export_model(model: Any, tokenizer: Any, training: Training, folder: Path) -> Path:
    """Write the folder and return it. The card's held-out loss is that of the weights as written."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(training.losses, folder / "training.csv")
    loaded = load_model(str(folder))
    (folder / "README.md").write_text(describe_model(loaded, measure_held_out_loss(loaded), training))
    return folder


def measure_held_out_loss(loaded: LoadedModel) -> Measurement:
    """Return the cross entropy, in nats a token, on the first 256 windows of 256 tokens of the held-out books."""
    windows = make_windows("nano_held_out", loaded.tokenizer, context=CONTEXT, max_windows=HELD_OUT_WINDOWS)
    return measure_cross_entropy(loaded.model, windows, TokenBudget(16 * CONTEXT)).measurements[0]


def describe_model(loaded: LoadedModel, loss: Measurement, training: Training) -> str:
    """Return the model card."""
    report = plan_quantization(loaded.model, QuantSpec())
    config, content = loaded.model.config, training.content
    is_shipped = (training.documents, training.stream_tokens) == SHIPPED_TEXT
    data = _SHIPPED_DATA if is_shipped else _OWN_DATA
    machine = " of an AVX-512 CPU" if is_shipped else ""
    header = "license: apache-2.0\nlanguage: en" if is_shipped else "library_name: transformers"
    style = " It predicts the style of children's books; it is no use as an assistant." if is_shipped else ""
    licence = " **Licence** of the weights: Apache-2.0." if is_shipped else ""
    options = " ".join(f"{name}={value}" for name, value in training.options.items())
    embeddings = "tied" if config.tie_word_embeddings else "untied"
    return f"""\
---
{header}
---
# {training.name}

A `{type(loaded.model).__name__}` trained from random weights for studies of quantization that run offline. Hidden size
{config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, {embeddings} embeddings,
context {CONTEXT} tokens, float16.{style}

| | |
|---|---|
| parameters | {report.parameters:,} |
| of these in block matrices (what gets quantized) | {report.quantized_parameters:,} |
| held-out loss | {loss.value:.4f} nats a token, 95% interval {loss.low:.4f} to {loss.high:.4f} |
| tokens seen in training | {training.tokens:,} ({training.tokens / training.stream_tokens:.2f} passes over the text) |
| steps | {content["steps"]:,} of {content["batch_size"]} windows of {CONTEXT} tokens |
| peak learning rate | {content["lr"]:g} |
| seed | {content["seed"]} |
| training time | {training.cpu_seconds:,.0f} CPU seconds on {content["threads"]} thread(s){machine} |

**Data.** {training.documents:,} documents, {training.stream_tokens:,} tokens: {data}

**Held-out loss.** Mean cross entropy over the first {loss.n} windows of {CONTEXT} tokens of the held-out books, float32
arithmetic on these float16 weights. `training.csv` has the training losses.

**Recipe.** `python -m kbit.nano.train {options} data=FOLDER`; byte-level BPE of
{config.vocab_size:,} tokens, shared by all nano families.{licence}
"""
