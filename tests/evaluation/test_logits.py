"""The streamed head against log_softmax on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kbit.evaluation.logits
from kbit.evaluation.logits import compare_heads, iterate_logits, score_targets

HIDDEN, VOCABULARY, PLACES = 16, 1300, 40  # three slices, the last one short


def make_head(seed: int, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(HIDDEN, VOCABULARY, bias=bias)


def make_states(seed: int) -> torch.Tensor:
    return 10 * torch.randn(PLACES, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kbit.evaluation.logits.LOGITS_AT_ONCE, "cpu", 512 * PLACES)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_slices_are_the_whole_vocabulary(dtype: torch.dtype, bias: bool) -> None:
    head, hidden = make_head(0, bias).to(dtype), make_states(0).to(dtype)
    slices = list(iterate_logits(head, hidden))
    assert [start for start, _ in slices] == [0, 512, 1024]
    # one product of 16 terms, in another blocking; in bfloat16 the same rounding of sums that differ in the last bit
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.07}[dtype]
    torch.testing.assert_close(torch.cat([x for _, x in slices], -1), head(hidden).float(), rtol=0, atol=tolerance)


@torch.no_grad()
@given(st.integers(0, 100), st.booleans())
def test_scores_are_log_softmax_and_argmax(seed: int, bias: bool) -> None:
    head, hidden = make_head(seed, bias), make_states(seed)
    places = torch.randint(0, PLACES, (90,), generator=torch.Generator().manual_seed(seed))
    targets = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(seed + 1))
    logits = head(hidden)
    targets[::2] = logits.argmax(-1)[places][::2]
    log_probabilities, hits = score_targets(head, hidden, places, targets)
    expected = logits.log_softmax(-1)[places, targets]
    torch.testing.assert_close(
        log_probabilities, expected, rtol=0, atol=2e-5
    )  # values to -60: 8 units in the last place
    assert hits.tolist() == (logits.argmax(-1)[places] == targets).tolist()


@torch.no_grad()
def test_of_equal_tokens_the_first_is_the_most_likely() -> None:
    head, hidden = make_head(0), make_states(0).abs()
    head.weight.zero_()
    head.weight[[7, 9, 600, 1299]] = 1.0  # in one slice and in others
    tokens = torch.tensor([7, 9, 600, 1299, 3])
    _, hits = score_targets(head, hidden, torch.zeros(5, dtype=torch.long), tokens)
    assert hits.tolist() == [True, False, False, False, False]


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 700, 1299])
def test_a_non_finite_logit_anywhere_shows(bad: float, place: int) -> None:
    head, hidden = make_head(0), make_states(0)
    head.weight[place] = bad
    scores, _ = score_targets(head, hidden, torch.arange(PLACES), torch.full((PLACES,), 5))
    assert not scores.isfinite().any()


@torch.no_grad()
@given(st.integers(0, 100), st.floats(1e-3, 1))
def test_the_comparison_is_kl_div_of_both_softmaxes(seed: int, noise: float) -> None:
    head, hidden = make_head(seed), make_states(seed)
    baseline = hidden + noise * make_states(seed + 1)
    targets = torch.randint(0, VOCABULARY, (PLACES,), generator=torch.Generator().manual_seed(seed))
    log_p, divergence, agreement = compare_heads(head, hidden, head, baseline, targets)
    mine, theirs = head(hidden).double().log_softmax(-1), head(baseline).double().log_softmax(-1)
    torch.testing.assert_close(log_p.double(), mine.gather(1, targets[:, None])[:, 0], rtol=0, atol=2e-5)
    expected = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)
    # float32 logits near 30 are good to 2e-6, and the divergence is a mean of their differences
    torch.testing.assert_close(divergence, expected, rtol=1e-5, atol=1e-5)
    assert agreement.tolist() == (mine.argmax(-1) == theirs.argmax(-1)).tolist()


@torch.no_grad()
def test_a_model_does_not_diverge_from_itself() -> None:
    head, hidden = make_head(3), make_states(3)
    _, divergence, agreement = compare_heads(head, hidden, head, hidden, torch.zeros(PLACES, dtype=torch.long))
    assert divergence.tolist() == [0.0] * PLACES
    assert agreement.all()
