"""Which weights make which inputs: compared with what a model does when one hidden unit's incoming weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from kbit.models.architectures import deviation_of, find_sources, list_decoder_layers, measure_deviation, orient

KNOWN = ["gpt_neox", "gpt2", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "phi"]
SHAPES: dict[str, dict[str, Any]] = {"llama": {"num_key_value_heads": 2}}  # grouped-query attention
TOKENS = torch.arange(1, 25).view(2, 12)

Build = Callable[..., Any]


def record_inputs(model: Any, modules: list[str]) -> dict[str, torch.Tensor]:
    """The inputs [tokens, in] of these modules on TOKENS."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: seen.__setitem__(name, inputs[0].detach().flatten(0, -2).clone())

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", KNOWN)
def test_every_matrix_of_the_blocks_has_sources_that_make_as_many_units_as_it_reads(
    build_tiny: Build, architecture: str
) -> None:
    model = build_tiny(architecture, **SHAPES.get(architecture, {}))
    sources = find_sources(model)
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and (".layers." in n or ".h." in n)]
    assert set(matrices) < set(sources)
    for name in matrices:
        assert len(measure_deviation(model, sources[name])) == orient(model, name).shape[-1]


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_unit_without_incoming_weights_is_the_input_dimension_that_falls_silent(
    build_tiny: Build, architecture: str
) -> None:
    """For attention's output and the inner units: where a unit's rows (and biases) are zero, so is its dimension."""
    model = build_tiny(architecture, **SHAPES.get(architecture, {}))
    block = list_decoder_layers(model)[1]
    sources = find_sources(model)
    for reader in (block.attention_out, block.feed_forward_out):
        before = record_inputs(model, [reader])[reader]
        unit = 37
        for source in sources[f"{reader}.weight"]:
            row = unit if source.rows is None else int(source.rows[unit])
            with torch.no_grad():
                orient(model, source.name)[row] = 0
                bias = getattr(model.get_submodule(source.name.removesuffix(".weight")), "bias", None)
                if bias is not None:
                    bias[row] = 0
        after = record_inputs(model, [reader])[reader]
        assert (after[:, unit] == 0).all()
        assert (before[:, unit] != 0).any()
        changed = (before != after).any(0).nonzero().flatten().tolist()
        assert unit in changed
        assert len(changed) <= 2  # heads that share a row of the values fall silent together


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_residual_stream_is_read_after_what_was_last_added(build_tiny: Build, architecture: str) -> None:
    """Other weights of the block before do not change what is read; those of the sources do."""
    model = build_tiny(architecture)
    sources, (first, second) = find_sources(model), list_decoder_layers(model)
    for readers in (second.attention, second.feed_forward):
        reader = readers[0]
        before = record_inputs(model, [reader])[reader]
        for source in sources[f"{reader}.weight"]:
            weight = orient(model, source.name)
            keep = weight[5].clone()
            with torch.no_grad():
                weight[5] += 1
            assert not torch.equal(record_inputs(model, [reader])[reader], before), source.name
            with torch.no_grad():
                weight[5] = keep
    is_parallel = architecture in {"gpt_neox", "phi"}
    attended, fed = f"{first.attention_out}.weight", f"{first.feed_forward_out}.weight"
    last = [attended, fed] if is_parallel else [fed]
    assert [s.name for s in sources[f"{second.attention[0]}.weight"]] == last
    last = last if is_parallel else [f"{second.attention_out}.weight"]
    assert [s.name for s in sources[f"{second.feed_forward[0]}.weight"]] == last


def test_a_sequential_gpt_neox_is_read_in_sequence(build_tiny: Build) -> None:
    model = build_tiny("gpt_neox", use_parallel_residual=False)
    block = list_decoder_layers(model)[0]
    assert [s.name for s in find_sources(model)[f"{block.feed_forward[0]}.weight"]] == [f"{block.attention_out}.weight"]


def test_the_first_block_reads_the_embedding_and_the_head_the_last_block(build_tiny: Build) -> None:
    model = build_tiny("opt")
    sources, blocks = find_sources(model), list_decoder_layers(model)
    assert [s.name for s in sources[f"{blocks[0].attention[0]}.weight"]] == ["model.decoder.embed_tokens.weight"]
    assert orient(model, "model.decoder.embed_tokens.weight").shape == (64, 259)
    assert [s.name for s in sources["lm_head.weight"]] == [f"{blocks[-1].feed_forward_out}.weight"]
    with torch.device("meta"):
        config = transformers.OPTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
        )  # as OPT-350M has it
        narrow = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    first = find_sources(narrow)[f"{blocks[0].attention[0]}.weight"]
    assert [s.name for s in first] == ["model.decoder.project_in.weight"]
    assert "lm_head.weight" not in find_sources(narrow)


def test_deviation_is_the_standard_deviation() -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02 + 0.005
    for dim in (0, 1):
        assert torch.allclose(deviation_of(x, dim).double(), x.std(dim, correction=0), rtol=1e-5)
    assert (deviation_of(torch.zeros(3, 4), 1) == 0).all()


def test_an_unknown_architecture_is_named(build_tiny: Build) -> None:
    with pytest.raises(ValueError, match=r"MixtralForCausalLM \(model_type 'mixtral'\) is not known; it is of: bloom"):
        find_sources(build_tiny("mixtral"))
