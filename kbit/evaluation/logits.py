"""Log-probabilities from hidden states and a language model's head, computed slice by slice of the vocabulary.

A vocabulary of 50,000 tokens makes 200 KB of logits for each place. The logits of all places and tokens never exist at
once: a slice fits the caches, and log-sum-exp is kept as a running maximum m and a sum of exp(logit - m) (Milakov &
Gimelshein 2018, "Online normalizer calculation for softmax").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

# The number of float32 logits at once: 8 MiB on a CPU (measured: slices of 2 to 16 MiB differ by 5%), 256 MiB on a GPU.
LOGITS_AT_ONCE: Final = {"cpu": 2**21, "cuda": 2**26}
_FEWEST_TOKENS: Final = 512  # a slice's least width, as a matrix product of fewer columns is slow


@dataclass
class Normalizer:
    """The softmax's normalizer at n places, over the slices so far.

    Attributes:
        largest: float32 [n], the largest logit.
        total: float32 [n], the sum of exp(logit - largest).
    """

    largest: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, places: torch.Tensor) -> Normalizer:
        """Return the normalizer of no logits, for as many places as the tensor has rows."""
        n, device = len(places), places.device
        return cls(torch.full((n,), -torch.inf, device=device), torch.zeros(n, device=device))

    def add(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a slice of logits [n, tokens], and overwrite it.

        Returns:
            exp(logits - largest) [n, tokens], and the factor [n] that earlier sums of such values have to be scaled by.
        """
        larger = torch.maximum(self.largest, logits.amax(-1))
        scale = (self.largest - larger).exp()
        weights = logits.sub_(larger[:, None]).exp_()
        self.largest, self.total = larger, self.total * scale + weights.sum(-1)
        return weights, scale

    def log_softmax(self, logits: torch.Tensor, places: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Return the log-probabilities of logits at these places, after the last slice."""
        return (logits - self.largest[places]) - self.total[places].log()


def iterate_logits(head: nn.Linear, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first token, float32 logits [n, tokens]) of hidden states [n, hidden size], for slices of the vocabulary.

    The product is computed in the head's dtype, as the model itself computes it.
    """
    step = max(_FEWEST_TOKENS, LOGITS_AT_ONCE[hidden.device.type] // max(1, len(hidden)))
    for start in range(0, head.weight.shape[0], step):
        tokens = slice(start, start + step)
        yield start, F.linear(hidden, head.weight[tokens], None if head.bias is None else head.bias[tokens]).float()


def score_targets(
    head: nn.Linear, hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability [m], float32, of each target and whether it is the most likely token [m].

    Of equally likely tokens the first is the most likely, as for argmax.

    Args:
        head: the output embedding.
        hidden: the trunk's last states [n, hidden size].
        places: int64 [m], the index of the state that predicts each target.
        targets: int64 [m], the predicted tokens.
    """
    normalizer = Normalizer.empty(hidden)
    at_target = torch.empty(len(targets), device=hidden.device)
    is_first = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    for start, logits in iterate_logits(head, hidden):
        inside = ((targets >= start) & (targets < start + logits.shape[1])).nonzero()[:, 0]
        place, token = places[inside], targets[inside] - start
        at_target[inside] = logits[place, token]
        beats_earlier = at_target[inside] > normalizer.largest[place]
        is_first[inside] = beats_earlier & (logits[place].argmax(-1) == token)
        normalizer.add(logits)
    hits = is_first & (at_target == normalizer.largest[places])
    return normalizer.log_softmax(at_target, places), hits


def compare_heads(
    head: nn.Linear,
    hidden: torch.Tensor,
    baseline_head: nn.Linear,
    baseline_hidden: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log p(target), the divergence sum_v b(v) (log b(v) - log p(v)) and whether argmax b = argmax p, each [n].

    The divergence takes one pass. With the model's logits x and the baseline's logits y it is

        sum_v b(v) (y_v - x_v) - log sum exp y + log sum exp x,

    which is exactly 0 where the logits are equal.

    Args:
        head, hidden: the output embedding of the model p, and its states [n, hidden size].
        baseline_head, baseline_hidden: the output embedding of the baseline b, and its states [n, hidden size].
        targets: int64 [n], the predicted tokens.
    """
    mine, theirs = Normalizer.empty(hidden), Normalizer.empty(hidden)
    at_target, gap = torch.empty(len(targets), device=hidden.device), torch.zeros(len(targets), device=hidden.device)
    likeliest = torch.zeros(2, len(targets), dtype=torch.long, device=hidden.device)
    slices = zip(iterate_logits(head, hidden), iterate_logits(baseline_head, baseline_hidden), strict=True)
    for (start, logits), (_, baseline) in slices:
        inside = ((targets >= start) & (targets < start + logits.shape[1])).nonzero()[:, 0]
        at_target[inside] = logits[inside, targets[inside] - start]
        for which, (normalizer, values) in enumerate([(mine, logits), (theirs, baseline)]):
            largest, index = values.max(-1)
            likeliest[which] = torch.where(largest > normalizer.largest, index + start, likeliest[which])
        difference = baseline - logits
        mine.add(logits)
        weights, scale = theirs.add(baseline)
        gap = gap * scale + (weights * difference).sum(-1)
    log_sum = [n.largest.double() + n.total.double().log() for n in (mine, theirs)]
    divergence = gap.double() / theirs.total.double() + log_sum[0] - log_sum[1]
    return mine.log_softmax(at_target), divergence, likeliest[0] == likeliest[1]
