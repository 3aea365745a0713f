"""How many tokens go through a model at once: a budget that adapts to the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class TokenBudget:
    """The number of tokens of a forward pass, padding included.

    Attributes:
        tokens: the budget, which is halved each time that memory runs out.
        halvings: how often memory ran out.
    """

    tokens: int
    halvings: int = 0

    def attempt(self, function: Callable[[], T], *, can_split: bool) -> T | None:
        """Return the function's result on a batch. If memory runs out, halve the budget and return None.

        Raises:
            MemoryError: memory ran out on a batch that cannot be split into smaller ones.
        """
        try:
            return function()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            if not can_split:
                raise MemoryError(f"not even one sequence fits into memory: {error}") from None
        # This stands after the except block, whose error holds the frames of the attempt and so its tensors.
        self.tokens = max(1, self.tokens // 2)
        self.halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the card or on the CPU (for which torch has no error of its own)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
