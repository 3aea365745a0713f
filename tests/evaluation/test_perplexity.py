"""Cross entropy on fixed windows: the definition, and the recorded losses of the shipped models."""

from __future__ import annotations

import bz2
import dataclasses
import errno
import gzip
import json
import lzma
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kbit.data.tasks import load_tasks
from kbit.data.texts import read_documents
from kbit.data.windows import Windows, make_windows
from kbit.evaluation.measurement import NonFiniteError
from kbit.evaluation.perplexity import (
    Reference,
    compute_reference,
    measure_cross_entropy,
    measure_rolling,
    reserve_space,
)
from kbit.evaluation.scorer import Scorer
from kbit.evaluation.token_budget import TokenBudget
from kbit.models.loading import LoadedModel, load_model

Build = Callable[..., Any]

CONTEXT = 256
STORY = "Once upon a time there was a mouse who lived in a clock. "


@pytest.fixture(scope="module")
def nano() -> LoadedModel:
    return load_model("nano-neox-98k")


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> Windows:
    return make_windows("nano_held_out", tokenizer, context=CONTEXT, max_windows=8)


def test_windows_are_consecutive_and_do_not_overlap(tokenizer: Any, windows: Windows) -> None:
    documents, sha256 = read_documents("nano_held_out")
    stream = [0, *tokenizer(documents[0])["input_ids"]]  # the first document is longer than these windows
    assert windows.tokens.flatten().tolist() == stream[: 8 * CONTEXT]
    assert windows.tokens.shape == (8, CONTEXT)
    assert windows.sha256 == sha256


def test_every_document_starts_with_one_end_of_text_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one mouse", "two mice"]))
    one, two = tokenizer("one mouse")["input_ids"], tokenizer("two mice")["input_ids"]
    whole = make_windows(str(path), tokenizer, context=len(one) + len(two) + 2, max_windows=None)
    assert whole.tokens.tolist() == [[0, *one, 0, *two]]


@pytest.mark.parametrize(
    "text", [STORY * 3000, "Cafés, naïveté, «déjà vu»… " * 4000, "a" * 200_000, "\n \n\t" * 40_000]
)
def test_only_the_start_of_a_long_text_is_tokenized(tmp_path: Path, tokenizer: Any, text: str) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    whole = [0, *tokenizer(text)["input_ids"]]
    noting = NotingTokenizer(tokenizer)
    windows = make_windows(str(path), noting, context=CONTEXT, max_windows=3)
    assert windows.tokens.flatten().tolist() == whole[: 3 * CONTEXT]
    assert noting.read[0] < len(whole)


class NotingTokenizer:
    """A tokenizer that notes how many tokens it made at each call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.read: list[int] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        encoded = self.tokenizer(*arguments, **options)
        self.read.append(len(encoded["input_ids"]))
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_what_is_left_after_the_last_window_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY * 10)
    ids = [0, *tokenizer(STORY * 10)["input_ids"]]
    cut = make_windows(str(path), tokenizer, context=50, max_windows=None)
    assert cut.tokens.flatten().tolist() == ids[: len(ids) // 50 * 50]
    assert len(ids) % 50 != 0


def test_a_window_of_l_tokens_predicts_l_minus_1(nano: LoadedModel, windows: Windows) -> None:
    with torch.no_grad():
        log_probabilities = nano.model(windows.tokens).logits.log_softmax(-1)
    predicted = log_probabilities[:, :-1].gather(2, windows.tokens[:, 1:, None])
    assert predicted.numel() == 8 * (CONTEXT - 1)
    nats, _, _ = measure_cross_entropy(nano.model, windows, TokenBudget(8 * CONTEXT)).measurements
    assert nats.value == pytest.approx(-predicted.mean().item(), abs=1e-5)  # float32 sums of 2,040 terms near 4


def test_bits_per_byte_and_perplexity_are_the_loss_in_other_units(nano: LoadedModel, windows: Windows) -> None:
    nats, bits_per_byte, perplexity = measure_cross_entropy(nano.model, windows, TokenBudget(8 * CONTEXT)).measurements
    assert [m.metric for m in (nats, bits_per_byte, perplexity)] == ["cross_entropy", "bits_per_byte", "perplexity"]
    assert bits_per_byte.value == pytest.approx(nats.value / (math.log(2) * windows.bytes_per_token))
    assert perplexity.value == pytest.approx(math.exp(nats.value))
    assert perplexity.low == pytest.approx(math.exp(nats.low))
    assert nats.low < nats.value < nats.high


def test_bytes_are_counted_in_utf8(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "accents.txt"
    path.write_text("é" * 100, encoding="utf-8")
    tokens = 1 + len(tokenizer("é" * 100)["input_ids"])
    whole = make_windows(str(path), tokenizer, context=tokens, max_windows=None)
    assert whole.bytes_per_token == 200 / tokens  # the end-of-text token covers no byte


def test_a_random_model_is_near_the_uniform_loss(build_tiny: Build, windows: Windows) -> None:
    nats, _, _ = measure_cross_entropy(
        build_tiny("llama", vocab_size=1024), windows, TokenBudget(8 * CONTEXT)
    ).measurements
    # Logits of standard deviation s cost about s^2/2 nats more than ln V; here s = 0.02 sqrt(64) = 0.16.
    assert nats.value == pytest.approx(math.log(1024), abs=0.05)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_matter(nano: LoadedModel, windows: Windows, batch_size: int) -> None:
    reference = measure_cross_entropy(nano.model, windows, TokenBudget(8 * CONTEXT)).measurements[0].value
    assert measure_cross_entropy(nano.model, windows, TokenBudget(batch_size * CONTEXT)).measurements[
        0
    ].value == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 3 * CONTEXT])
def test_the_distance_from_a_reference_does_not_depend_on_the_batch(
    build_tiny: Build, nano: LoadedModel, windows: Windows, budget: int
) -> None:
    """Of a random model from a trained one, a large distance; the reference from batches of another size, too."""
    model = build_tiny("gpt_neox", vocab_size=1024)
    baseline: Any = nano.model
    head, whole = baseline.get_output_embeddings(), TokenBudget(8 * CONTEXT)
    first = Reference(compute_reference(nano.model, windows, whole), head)
    second = Reference(compute_reference(nano.model, windows, TokenBudget(budget)), head)
    expected = measure_cross_entropy(model, windows, whole, first).measurements
    for m, n in zip(
        expected, measure_cross_entropy(model, windows, TokenBudget(budget), second).measurements, strict=True
    ):
        assert m.metric == n.metric
        assert m.value == pytest.approx(n.value, rel=1e-4)  # float32 in other batches
    divergence = next(m for m in expected if m.metric == "kl_divergence")
    assert divergence.value > 1
    assert divergence.low < divergence.value < divergence.high


def test_states_that_find_no_space_are_an_error_before_any_work(
    nano: LoadedModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    endless = dataclasses.replace(windows, tokens=torch.zeros(1, dtype=torch.long).expand(2**33, CONTEXT))
    size = f"{2**33 * (CONTEXT - 1) * 64 * 4:,}"  # windows, tokens, hidden size, float32: 560 terabytes
    free = f"{shutil.disk_usage(tmp_path).free:,}"[:3]
    with pytest.raises(OSError, match=rf"take {size} bytes in {tmp_path}, of which {free}[0-9,]* are free \(No space"):
        compute_reference(nano.model, endless, TokenBudget(CONTEXT))
    assert not any(tmp_path.iterdir())


def test_space_that_another_process_takes_first_is_the_same_error(
    nano: LoadedModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", take, raising=False)
    with pytest.raises(OSError, match=rf"take {8 * (CONTEXT - 1) * 64 * 4:,} bytes .*No space left on device"):
        compute_reference(nano.model, windows, TokenBudget(CONTEXT))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_the_space_is_taken_and_not_only_named() -> None:
    with tempfile.NamedTemporaryFile() as file:
        reserve_space(file, 2**20)
        assert os.fstat(file.fileno()).st_size == 2**20 <= 512 * os.fstat(file.fileno()).st_blocks


def test_a_model_whose_head_is_not_its_last_step_is_measured_on_its_own_logits(
    build_tiny: Build, windows: Windows
) -> None:
    model = build_tiny("gemma2", vocab_size=1024, head_dim=16)  # caps its logits
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # so that the cap of 30 matters
        tokens = windows.tokens[:1]
        log_p = model(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])
    one = dataclasses.replace(windows, tokens=tokens)
    scores = measure_cross_entropy(model, one, TokenBudget(CONTEXT))
    assert [i.metric for i in scores.items] == ["cross_entropy"]
    assert scores.measurements[0].value == pytest.approx(-log_p.mean().item(), rel=1e-5)


# ---- lm-eval's rolling definition

ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def test_rolling_perplexity_is_lm_evals(tmp_path: Path, nano: LoadedModel) -> None:
    texts = [STORY * 20, "A café — and a mouse.", "Then it rained."]  # the first is longer than the context
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, _ = read_documents(str(tmp_path / "text.jsonl"))
    (tmp_path / "rolling.yaml").write_text(ROLLING.replace("FILE", "text.jsonl"))
    scorer = Scorer(nano.model, nano.tokenizer)
    mine = {m.metric: m for m in measure_rolling(scorer, "text", documents).measurements}
    [task] = load_tasks(["rolling"], str(tmp_path))
    theirs = lm_eval.simple_evaluate(
        HFLM(nano.model, tokenizer=nano.tokenizer, softmax_dtype=torch.float32),
        tasks=[task.task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["results"]["rolling"]
    per_word = mine.pop("word_cross_entropy")
    assert math.exp(per_word.value) == pytest.approx(mine["word_perplexity"].value)
    for metric, m in mine.items():
        assert m.value == pytest.approx(theirs[f"{metric},none"], rel=1e-4)
        assert m.low < m.value < m.high
        assert m.n == 3
    assert set(mine) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


def test_a_text_without_spaces_keeps_its_cross_entropy(nano: LoadedModel) -> None:
    """One "word" of 400 tokens: its perplexity is beyond float64."""
    measured = measure_rolling(Scorer(nano.model, nano.tokenizer), "text", ["mouse" * 200, "clock" * 200]).measurements
    by_metric = {m.metric: m for m in measured}
    assert set(by_metric) == {"word_cross_entropy", "byte_perplexity", "bits_per_byte"}
    assert 709.8 < by_metric["word_cross_entropy"].value < math.inf
    assert by_metric["bits_per_byte"].value == pytest.approx(by_metric["word_cross_entropy"].value / 1000 / math.log(2))


def test_a_model_that_loses_more_than_exp_can_say_keeps_its_loss(build_tiny: Build, windows: Windows) -> None:
    model = build_tiny("llama", vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    nats, bits, *others = measure_cross_entropy(model, windows, TokenBudget(8 * CONTEXT)).measurements
    assert 709.8 < nats.value < math.inf
    assert bits.metric == "bits_per_byte"
    assert others == []


def test_a_divergence_that_is_not_finite_is_an_error_and_no_number(build_tiny: Build, windows: Windows) -> None:
    """The 16-bit model may be the broken one: the model's own loss is finite then."""
    model = build_tiny("llama", vocab_size=1024)
    hidden = compute_reference(model, windows, TokenBudget(CONTEXT))
    hidden[3, 5, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"kl divergence on 'nano_held_out' is not finite"):
        measure_cross_entropy(model, windows, TokenBudget(CONTEXT), Reference(hidden, model.lm_head))


def test_a_single_window_has_no_interval(nano: LoadedModel, tokenizer: Any) -> None:
    one = make_windows("nano_held_out", tokenizer, context=CONTEXT, max_windows=1)
    nats, _, _ = measure_cross_entropy(nano.model, one, TokenBudget(8 * CONTEXT)).measurements
    assert math.isfinite(nats.value)
    assert math.isnan(nats.low)


def test_a_nan_weight_is_an_error_and_no_number(build_tiny: Build, windows: Windows) -> None:
    model = build_tiny("gpt2", vocab_size=1024)
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="nano_held_out"):
        measure_cross_entropy(model, windows, TokenBudget(8 * CONTEXT))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".txt", bytes), (".txt.gz", gzip.compress), (".txt.xz", lzma.compress), (".txt.bz2", bz2.compress)],
)
def test_a_plain_text_is_one_document_compressed_or_not(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"story{suffix}"
    path.write_bytes(compress(b"line one\nline two\n"))
    documents, sha256 = read_documents(str(path))
    assert documents == ["line one\nline two\n"]
    assert sha256 == "e9024f1a07d29d52ad3aa5e1a18e94db1f3a9fd32b89e39d47c472cd99071e13"  # by sha256sum


@pytest.mark.parametrize(("suffix", "compress"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress)])
def test_json_lines_are_one_document_a_line(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"stories{suffix}"
    path.write_bytes(compress(b'{"text": "one"}\n\n{"text": "two", "id": 7}\n'))
    assert read_documents(str(path))[0] == ["one", "two"]


def test_a_record_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text('{"text": "one"}\n{"story": "two"}\n')
    with pytest.raises(ValueError, match=r"stories\.jsonl: record 2 has no field 'text'"):
        read_documents(str(path))


def test_a_text_that_is_not_there_names_the_path_and_the_embedded_ones(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.txt"
    with pytest.raises(FileNotFoundError, match=rf"nano_held_out.*{missing}"):
        read_documents(str(missing))


def test_a_text_shorter_than_a_window_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    with pytest.raises(ValueError, match=r"has \d+ tokens, less than one window of 256"):
        make_windows(str(path), tokenizer, context=CONTEXT, max_windows=None)
