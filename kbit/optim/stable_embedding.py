"""The stable embedding layer, made for training with 8-bit states (Dettmers et al. 2022, section 2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

_OPTIONS: Final = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class StableEmbedding(nn.Embedding):
    """An embedding with Xavier uniform weights and a layer norm after it.

    The norm keeps the gradients of rare and frequent tokens of one size. The paper also keeps the embedding's optimizer
    states at 32 bits, which a group of parameters of kbit.optim does: {"params": ..., "state": "32bit"}.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew, 0 for the padding index."""
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised vectors of the tokens."""
        embedded: Tensor = self.norm(super().forward(input))
        return embedded


def make_embedding_stable(model: Any) -> StableEmbedding:
    """Replace the input embedding of a transformers model by a stable one with new weights, and return it.

    A head that shares the embedding's weight shares the new one.

    Raises:
        ValueError: the model's input embedding is no plain torch.nn.Embedding, or is frozen.
    """
    old = model.get_input_embeddings()
    if type(old) is not nn.Embedding:
        raise ValueError(f"the input embedding is a {type(old).__name__}, not a torch.nn.Embedding")
    if not old.weight.requires_grad:
        raise ValueError("the input embedding is frozen (requires_grad=False): its new weights would stay random")
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is old.weight
    options: dict[str, Any] = {name: getattr(old, name) for name in _OPTIONS}
    options |= {"device": old.weight.device, "dtype": old.weight.dtype}
    new = StableEmbedding(old.num_embeddings, old.embedding_dim, **options)
    model.set_input_embeddings(new.train(old.training))
    if is_tied:
        head.weight = new.weight
    return new


@contextlib.contextmanager
def embedding_stable(model: Any) -> Iterator[StableEmbedding]:
    """Replace the input embedding within the block, see make_embedding_stable. Afterwards it is the one of before."""
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = None if head is None else head.weight
    try:
        yield make_embedding_stable(model)
    finally:
        model.set_input_embeddings(old)
        if head is not None:
            head.weight = weight
