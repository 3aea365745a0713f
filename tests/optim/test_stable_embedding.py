"""The stable embedding layer, alone and in models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kbit.optim import StableEmbedding, make_embedding_stable


def test_vectors_are_normalised_and_weights_are_xavier_uniform() -> None:
    torch.manual_seed(0)
    layer = StableEmbedding(2000, 64, padding_idx=3)
    vectors = layer(torch.arange(4, 2000)).detach()
    torch.testing.assert_close(vectors.mean(-1), torch.zeros(1996), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.std(-1, correction=0), torch.ones(1996), atol=0.02, rtol=0)
    bound = (6 / (2000 + 64)) ** 0.5
    assert 0.99 * bound < float(layer.weight.detach().max()) <= bound
    assert (layer.weight[3] == 0).all()
    layer(torch.tensor([5])).sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "opt", "bloom"])
def test_a_model_gets_one_and_a_shared_head_shares_it(architecture: str, build_tiny: Callable[..., Any]) -> None:
    model = build_tiny(architecture).train()
    was_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    layer = make_embedding_stable(model)
    assert model.get_input_embeddings() is layer
    assert layer.training
    assert (model.get_output_embeddings().weight is layer.weight) == was_tied
    loss = model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss
    loss.backward()
    assert layer.norm.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"is a StableEmbedding, not a torch\.nn\.Embedding"):
        make_embedding_stable(model)


def test_options_of_the_embedding_are_kept_and_a_frozen_one_is_refused(build_tiny: Callable[..., Any]) -> None:
    model = build_tiny("gpt2")
    old = model.get_input_embeddings()
    old.max_norm, old.norm_type, old.scale_grad_by_freq, old.sparse = 0.5, 1.0, True, True
    new = make_embedding_stable(model)
    assert (new.max_norm, new.norm_type, new.scale_grad_by_freq, new.sparse) == (0.5, 1.0, True, True)
    frozen = build_tiny("gpt2")
    frozen.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match="the input embedding is frozen"):
        make_embedding_stable(frozen)
