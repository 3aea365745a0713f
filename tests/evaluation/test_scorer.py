"""The scorer against lm-eval's own, and where it must differ: its logits cache, over-long continuations, NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import kbit.evaluation.scorer
from kbit.data.task_files import find_local_tasks
from kbit.data.tasks import load_tasks
from kbit.evaluation.measurement import NonFiniteError
from kbit.evaluation.scorer import PREFIX_SHARING, Scorer
from kbit.evaluation.zero_shot import PreparedTask, prepare_task, score_tasks
from kbit.models.inference import check_causal
from kbit.models.loading import load_model

Build = Callable[..., Any]
Scores = list[tuple[float, bool]]

LIMIT = 12
CONTEXT = 256
# A sum of at most 256 log-probabilities of about -7, in float32, in two orders of summation and two paddings: each is
# good to about 1e-6 and their errors mostly cancel; 1e-4 is the product's promise.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def shipped_tasks() -> list[PreparedTask]:
    return [prepare_task(task, LIMIT) for task in load_tasks(sorted(find_local_tasks()))]


@pytest.fixture(scope="module")
def requests(shipped_tasks: list[PreparedTask]) -> list[Any]:
    return [instance for task in shipped_tasks for instance in task.instances]


def score(lm: HFLM, requests: list[Any]) -> Scores:
    scores: Scores = lm.loglikelihood(requests, disable_tqdm=True)
    return scores


def reference(model: Any, tokenizer: Any) -> HFLM:
    """lm-eval's own scorer in float32, without its logits cache, which is wrong for some requests (see below)."""
    return HFLM(model, tokenizer=tokenizer, batch_size=32, softmax_dtype=torch.float32, logits_cache=False)


def ask(context: str, continuation: str) -> Any:
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


def largest_difference(left: Scores, right: Scores) -> float:
    return max(abs(a - b) for (a, _), (b, _) in zip(left, right, strict=True))


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom", "llama", "mixtral"])
def test_random_models_score_as_under_lm_eval(
    build_tiny: Build, tokenizer: Any, requests: list[Any], architecture: str
) -> None:
    model = build_tiny(architecture, vocab_size=1024)
    theirs = score(reference(model, tokenizer), requests)
    mine = score(Scorer(model, tokenizer), requests)
    assert len(mine) == len(requests) > 200
    assert largest_difference(mine, theirs) < TOLERANCE
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


def test_a_trained_model_scores_as_under_lm_eval(requests: list[Any]) -> None:
    loaded = load_model("nano-neox-1m")
    theirs = score(reference(loaded.model, loaded.tokenizer), requests)
    mine = score(Scorer(loaded.model, loaded.tokenizer), requests)
    assert largest_difference(mine, theirs) < TOLERANCE
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert any(greedy for _, greedy in mine)  # a random model never is, and would not test it


def test_measurements_equal_lm_evals_own_evaluation(shipped_tasks: list[PreparedTask]) -> None:
    loaded = load_model("nano-neox-98k")
    theirs = lm_eval.simple_evaluate(
        reference(loaded.model, loaded.tokenizer),
        tasks=[copy.deepcopy(prepared.loaded.task) for prepared in shipped_tasks],
        task_manager=TaskManager(include_defaults=False),
        limit=LIMIT,
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    *measured, mean = score_tasks(Scorer(loaded.model, loaded.tokenizer), shipped_tasks).measurements
    assert len(measured) == 2 * 2 + 4 * 3 + 2 * 1  # perplexity and acc; acc, acc_norm and acc_bytes; acc alone
    for m in measured:
        # accuracies are equal; a perplexity is exp of a mean log-likelihood that is good to TOLERANCE
        expected = theirs[m.task][f"{m.metric},none"]
        assert m.value == pytest.approx(expected, rel=TOLERANCE if m.metric == "perplexity" else 1e-12), m
    assert mean.value == pytest.approx(fmean(results["acc,none"] for results in theirs.values()))


def test_requests_of_the_same_tokens_split_elsewhere_keep_their_own_scores(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    split = [ask("The cat sat on", " the mat"), ask("The cat sat", " on the mat")]
    alone = [score(Scorer(model, tokenizer), [request])[0] for request in split]
    together = score(Scorer(model, tokenizer), split)
    assert largest_difference(together, alone) < TOLERANCE
    # lm-eval 0.4.13 reads both from one row of logits, the shorter continuation at the longer one's place.
    cached = score(HFLM(model, tokenizer=tokenizer, batch_size=32, softmax_dtype=torch.float32), split)
    assert largest_difference(cached, alone) > 100 * TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_do_not_depend_on_the_batch_size(requests: list[Any], batch_size: int) -> None:
    loaded = load_model("nano-neox-98k")
    some = requests[::4]  # of every task
    by_32 = score(Scorer(loaded.model, loaded.tokenizer, batch_size=32), some)
    other = score(Scorer(loaded.model, loaded.tokenizer, batch_size=batch_size), some)
    assert largest_difference(by_32, other) < TOLERANCE
    assert [greedy for _, greedy in by_32] == [greedy for _, greedy in other]


def test_a_log_likelihood_is_the_sum_over_the_continuations_tokens(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("llama", vocab_size=1024)
    context, continuation = tokenizer("The cat sat on")["input_ids"], tokenizer(" the mat.")["input_ids"]
    sequence = torch.tensor([context + continuation])
    with torch.no_grad():
        log_probabilities = model(sequence).logits.log_softmax(-1)[0]
    expected = sum(log_probabilities[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
    [(value, _)] = score(Scorer(model, tokenizer), [ask("The cat sat on", " the mat.")])
    assert value == pytest.approx(expected, abs=TOLERANCE)


def test_a_continuation_longer_than_the_context_is_scored_and_counted(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    long = " x" * (2 * CONTEXT)
    tokens = torch.tensor([tokenizer(long)["input_ids"][-(CONTEXT + 1) :]])  # one to start from, the rest scored
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1]).logits.log_softmax(-1)
    expected = log_probabilities[0].gather(1, tokens[0, 1:, None]).sum().item()
    scorer = Scorer(model, tokenizer)
    scores = score(scorer, [ask("a", long), ask("a", " b")])
    assert scores[0][0] == pytest.approx(
        expected, abs=1e-3
    )  # 256 terms of about -7: float32 keeps 1e-4 of the sum 1,800
    assert scorer.truncated == 1
    with pytest.raises(AssertionError):  # why kbit has a scorer of its own
        score(reference(model, tokenizer), [ask("a", long)])


def test_a_long_context_loses_its_left_end_and_is_counted(build_tiny: Build, tokenizer: Any) -> None:
    scorer = Scorer(build_tiny("gpt_neox", vocab_size=1024), tokenizer)
    tail = " x" * (2 * CONTEXT)
    first, second = score(scorer, [ask("one thing" + tail, " end"), ask("another" + tail, " end")])
    assert first == second
    assert scorer.truncated == 2


def test_an_empty_context_is_scored_from_the_end_of_text_token(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("gpt_neox", vocab_size=1024)
    [token, *_] = tokenizer("word")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([[0]])).logits.log_softmax(-1)[0, 0, token].item()
    [(value, _)] = score(Scorer(model, tokenizer), [ask("", tokenizer.decode([token]))])
    assert value == pytest.approx(expected, abs=1e-5)


def test_a_nan_weight_is_an_error_and_no_number(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("gpt2", vocab_size=1024)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"nan for request .*' on the mat'"):
        score(Scorer(model, tokenizer), [ask("The cat sat", " on the mat")])


def test_bfloat16_logits_are_scored_in_float32(build_tiny: Build, tokenizer: Any, requests: list[Any]) -> None:
    model = build_tiny("llama", vocab_size=1024).to(torch.bfloat16)
    some = [instance for instance in requests if instance.task_name == "hellaswag"]
    in_bfloat16 = score(Scorer(model, tokenizer), some)
    upcast = score(Scorer(model.float(), tokenizer), some)
    assert len(some) == 4 * LIMIT
    # A log-softmax in bfloat16 left 17 distinct values of 96, up to 0.5 off, in float32 96 and 0.007 (measured with
    # lm-eval on a tiny Llama; 0.010 here). On trained models the bfloat16 logits themselves are off by more.
    assert len({value for value, _ in in_bfloat16}) >= 0.9 * len(some)
    assert largest_difference(in_bfloat16, upcast) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", sorted(PREFIX_SHARING))
def test_sharing_prefixes_does_not_change_the_scores(
    build_tiny: Build, tokenizer: Any, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"sliding_window": None} if architecture == "mistral" else {}
    model = build_tiny(architecture, vocab_size=1024, **fields).to(dtype)
    context = "Once upon a time there was a little girl who lived near the wood, and she"
    requests = [ask(context, ending) for ending in (" ran.", " ran away.", " was a", " ate the apple", " ran.")]
    shared = Scorer(model, tokenizer)
    assert shared.path == "prefix sharing"
    monkeypatch.setattr(kbit.evaluation.scorer, "PREFIX_SHARING", frozenset())
    alone = Scorer(model, tokenizer)
    assert alone.path == "one sequence per row"
    # Sums of some 40 nats: float32 is good to 1e-5. In bfloat16 a logit near 0.5 has steps of 0.002, and the order of
    # sums within attention differs.
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert largest_difference(score(shared, requests), score(alone, requests)) < tolerance
    assert len(shared.last_arrangement.rows) == 1 < len(alone.last_arrangement.rows)


def test_bloom_has_its_own_position_bias_again_afterwards(build_tiny: Build, tokenizer: Any) -> None:
    model = build_tiny("bloom", vocab_size=1024)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
        score(Scorer(model, tokenizer), [ask("The cat sat on", ending) for ending in (" the mat", " a hat")])
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("architecture", "fields", "path"),
    [
        ("mixtral", {}, "prefix sharing"),
        ("mixtral", {"sliding_window": 8}, "one sequence per row"),  # a mask of ours would lift the window
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "one sequence per row"),
        ("gemma2", {"head_dim": 16}, "hflm"),  # caps its logits after the head
    ],
)
def test_the_path_follows_the_architecture_and_scores_as_under_lm_eval(
    build_tiny: Build, tokenizer: Any, architecture: str, fields: dict[str, Any], path: str
) -> None:
    model = build_tiny(architecture, vocab_size=1024, **fields)
    context = "Once upon a time there was a little girl who lived near the wood, and she"
    requests = [ask(context, ending) for ending in (" ran.", " ran away.", " was a", " ate the apple", "!" * 20)]
    scorer = Scorer(model, tokenizer)
    assert scorer.path == path
    assert largest_difference(score(scorer, requests), score(reference(model, tokenizer), requests)) < TOLERANCE


def test_lm_evals_own_loop_also_gets_what_fits(build_tiny: Build, tokenizer: Any) -> None:
    scorer = Scorer(build_tiny("gemma2", vocab_size=1024, head_dim=16), tokenizer)
    [(value, _)] = score(scorer, [ask("a", " x" * (2 * CONTEXT))])
    assert value < -CONTEXT  # 256 tokens of some 7 nats each
    assert scorer.truncated == 1


def test_requests_asked_again_are_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("nano-neox-98k")
    scorer = Scorer(loaded.model, loaded.tokenizer)
    requests = [ask("The cat sat on", " the mat"), ask("x" * 300, " y" * 300)]
    first = score(scorer, requests)
    monkeypatch.setattr(scorer, "tok_encode", None)
    assert score(scorer, requests) == first
    assert scorer.truncated == 2  # the second request, in both calls


def test_the_first_tokens_sent_are_known(tokenizer: Any) -> None:
    loaded = load_model("nano-neox-98k")
    scorer = Scorer(loaded.model, loaded.tokenizer)
    score(scorer, [ask("The cat sat on", " the mat"), ask("a", " b")])
    assert list(scorer.first_tokens) == tokenizer("The cat sat on the mat")["input_ids"]


def test_a_request_with_nothing_to_score_is_an_error(build_tiny: Build, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"\('a', ''\) has no token to score"):
        score(Scorer(build_tiny("gpt2", vocab_size=1024), tokenizer), [ask("a", "")])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_when_memory_runs_out_batches_are_halved(
    requests: list[Any], monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    loaded = load_model("nano-neox-98k")
    some = requests[::8]
    expected = score(Scorer(loaded.model, loaded.tokenizer), some)
    scorer = Scorer(loaded.model, loaded.tokenizer)
    trunk = loaded.model.base_model.forward

    def with_little_memory(tokens: torch.Tensor, **arguments: Any) -> Any:
        if tokens.numel() > 600:
            raise error
        return trunk(tokens, **arguments)

    monkeypatch.setattr(loaded.model.base_model, "forward", with_little_memory)
    assert largest_difference(score(scorer, some), expected) < TOLERANCE
    assert scorer.budget.tokens == 512  # from 1,024
    scorer.set_batch_size(32)
    assert scorer.budget.tokens == 512  # what was learnt is kept
    monkeypatch.setattr(loaded.model.base_model, "forward", _raise(error))
    with pytest.raises(MemoryError, match="not even one sequence fits"):
        score(scorer, some)


def few_shot_requests(count: int) -> list[Any]:
    """Items behind one long common beginning, as in a few-shot task, two answers each."""
    common = "Once upon a time there was a little girl who lived near the wood. " * 12
    return [ask(f"{common}Item {i}:", answer) for i in range(count) for answer in (" a small red house", " no")]


@pytest.mark.parametrize("batch_size", [1, 32, 1024])
def test_a_long_context_makes_no_long_rows(build_tiny: Build, tokenizer: Any, batch_size: int) -> None:
    model = build_tiny("llama", vocab_size=1024, max_position_embeddings=32_768)
    requests = few_shot_requests(400)  # one row would have some 5,000 tokens
    scorer = Scorer(model, tokenizer, batch_size=batch_size)
    scores = score(scorer, requests)
    rows = scorer.last_arrangement.rows
    longest = max(len(query.tokens) for row in rows for query in row.queries)
    assert 200 < longest < max(row.length for row in rows)  # contexts are shared all the same
    assert max(row.length for row in rows) <= min(4096, max(scorer.budget.tokens, 2 * longest))
    some = slice(0, 800, 40)
    assert largest_difference(scores[some], score(reference(model, tokenizer), requests[some])) < TOLERANCE


def test_when_memory_runs_out_over_one_row_it_is_laid_out_again(
    build_tiny: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for a mask of 600 x 600 tokens: halving the budget is of no use as long as the rows stay."""
    model = build_tiny("gpt_neox", vocab_size=1024, max_position_embeddings=4096)
    requests = few_shot_requests(40)
    expected = score(reference(model, tokenizer), requests)
    trunk = model.base_model.forward

    def with_little_memory(tokens: torch.Tensor, attention_mask: torch.Tensor | None = None, **arguments: Any) -> Any:
        if attention_mask is not None and attention_mask.numel() > 600**2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trunk(tokens, attention_mask=attention_mask, **arguments)

    monkeypatch.setattr(model.base_model, "forward", with_little_memory)
    scorer = Scorer(model, tokenizer)
    assert largest_difference(score(scorer, requests), expected) < TOLERANCE
    halvings = scorer.budget.halvings
    assert halvings >= 1
    assert largest_difference(score(scorer, requests), expected) < TOLERANCE
    assert scorer.budget.halvings == halvings  # the rows are short from the start now
    monkeypatch.setattr(model.base_model, "forward", _raise(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(MemoryError, match="not even one sequence fits"):
        score(scorer, requests)


def _raise(error: Exception) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        raise error

    return forward


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_model_that_is_not_causal_is_refused(tokenizer: Any, is_decoder: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=1024, max_position_embeddings=64, is_decoder=is_decoder, **sizes)
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).train()
    if is_decoder:
        Scorer(model, tokenizer)
        return
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal: later tokens change"):
        Scorer(model, tokenizer)
    assert model.training


def test_no_architecture_is_taken_for_another_kind(build_tiny: Build) -> None:
    for architecture in ("gpt_neox", "bloom", "mixtral", "gpt_oss", "gemma2"):
        for dtype in (torch.float32, torch.bfloat16):
            check_causal(build_tiny(architecture).to(dtype))
