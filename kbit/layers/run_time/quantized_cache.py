"""A cache of keys and values in few bits, as transformers' cache, for scoring and generation alike.

A model with a quantized cache always computes with one, also where nobody asks for a cache: attention sees the keys and
values that the cache gives back. Per token, what is stored of a token is rounded at once, and depends on nothing else.
Per channel (KIVI, Liu et al. 2024) the tokens of a block share the scale of each channel, so that a block is rounded
when its last token is there. Tokens of the last block stay at 16 bits until then. A text is therefore read block by
block, each of which sees the blocks before it rounded, as generation does that adds one token at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kbit.layers.run_time.forwards import Forward
from kbit.layers.run_time.straight_through import round_straight
from kbit.layers.run_time.transient import CacheConfig, check_blocks
from kbit.models.inference import find_cache_name, in_evaluation_mode
from kbit.models.parameters import count_embedded
from kbit.numerics.quantizer import fake_quantize

_ROLE: Final = "quant.kv_cache"
_PROBE: Final = 2  # tokens
_BY_TOKEN: Final = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


class QuantizedCache(DynamicCache):
    """transformers' growing cache, whose keys and values are rounded.

    Attributes:
        quantizer: what rounds them.
    """

    def __init__(self, config: Any, quantizer: CacheConfig) -> None:
        super().__init__(config=config)
        self.quantizer = quantizer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens [batch, heads, tokens, channels], and return those to attend to."""
        wanted = self.quantizer
        keys = key_states if wanted.keys == "channel" else self._round_tokens(key_states, layer_idx)
        values = value_states if wanted.values == "channel" else self._round_tokens(value_states, layer_idx)
        held: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        if wanted.has_blocks_of_tokens:
            self._round_full_blocks(self.layers[layer_idx], key_states.shape[-2], layer_idx)
        return held

    def _round_tokens(self, states: Tensor, layer_idx: int) -> Tensor:
        return round_straight(states, lambda values: fake_quantize(values, self.quantizer), _name(layer_idx))

    def _round_full_blocks(self, layer: Any, new: int, layer_idx: int) -> None:
        """Round the blocks that the new tokens have filled. The tokens that read them are those after these."""
        wanted, size = self.quantizer, self.quantizer.block_tokens
        for name, axis in (("keys", wanted.keys), ("values", wanted.values)):
            states: Tensor = getattr(layer, name)
            length = states.shape[-2]
            start, end = (length - new) // size * size, length // size * size
            if axis == "channel" and end > start:
                rounded = self._round_channels(states[..., start:end, :], layer_idx)
                setattr(layer, name, torch.cat([states[..., :start, :], rounded, states[..., end:, :]], dim=-2))

    def _round_channels(self, states: Tensor, layer_idx: int) -> Tensor:
        spec = self.quantizer.of_channels
        return round_straight(states.mT, lambda values: fake_quantize(values, spec), _name(layer_idx)).mT


def _name(layer: int) -> str:
    return f"{_ROLE}: keys or values of layer {layer}"


class CachedForward(Forward):
    """The forward of a model's trunk that always has a quantized cache: takes the place of module.forward.

    Args:
        trunk: the module.
        quantizer: what rounds keys and values.
    """

    def __init__(self, trunk: nn.Module, quantizer: CacheConfig) -> None:
        self.quantizer, self.trunk = quantizer, trunk
        self._parameters = tuple(inspect.signature(trunk.forward).parameters)
        self._cache_name = find_cache_name(trunk.forward)

    @property
    def sees_whole_input(self) -> bool:
        """Whether tokens share scales, so that a row must be one text from its beginning."""
        return self.quantizer.has_blocks_of_tokens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the trunk returns, with a quantized cache."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        held = given.pop("past_key_values", None)  # the name before transformers 5.24, which it still takes
        cache = self._take(given.pop(self._cache_name, None) if held is None else held)
        given[self._cache_name] = cache
        return self._run_blocks(given, cache) if self.quantizer.has_blocks_of_tokens else self.before(**given)

    def _take(self, cache: Any) -> QuantizedCache:
        """Return a quantized cache in place of none or of an empty one."""
        if isinstance(cache, QuantizedCache):
            return cache
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
            raise ValueError(
                f"{_ROLE}: a {type(cache).__name__} of {cache.get_seq_length()} tokens is no quantized cache: give "
                "none, or the one that the model returned"
            )
        return QuantizedCache(self.trunk.config, self.quantizer)

    def _run_blocks(self, given: Mapping[str, Any], cache: QuantizedCache) -> Any:
        """Run the trunk on the rest of a block that is not full yet, then on block after block."""
        _check_rows(given)
        returns_dict = given.get("return_dict")
        config: Any = self.trunk.config
        if not (config.return_dict if returns_dict is None else returns_dict):
            raise ValueError(f"{_ROLE}: blocks of tokens have outputs that are joined by name: give return_dict=True")
        tokens = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        past, size = cache.get_seq_length(), self.quantizer.block_tokens
        end = past + tokens.shape[1]
        bounds = [past, *range((past // size + 1) * size, end, size), end]
        if len(bounds) == 2:
            return self.before(**given)
        outputs = [self.before(**_cut(given, first - past, last - past, past)) for first, last in pairwise(bounds)]
        if any(getattr(output, "hidden_states", None) or getattr(output, "attentions", None) for output in outputs):
            raise ValueError(f"{_ROLE}: with blocks of tokens there are no hidden states or attentions of all tokens")
        outputs[-1].last_hidden_state = torch.cat([output.last_hidden_state for output in outputs], dim=1)
        return outputs[-1]


def _check_rows(given: Mapping[str, Any]) -> None:
    """Raise ValueError unless each row is one text from its beginning, whose tokens may share scales."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.bool().all())):
        raise ValueError(
            f"{_ROLE}: tokens of a block share scales, so that a row may hold no padding: give rows of one length, and "
            "no attention_mask or one of ones [rows, tokens]"
        )
    if positions is not None and (positions.ndim != 2 or bool((positions.diff(dim=-1) != 1).any())):
        raise ValueError(
            f"{_ROLE}: tokens of a block share scales, so that a row must be one text: give no position_ids, or "
            f"consecutive ones [rows, tokens], not of shape {list(positions.shape)} with other steps or axes"
        )


def _cut(given: Mapping[str, Any], first: int, last: int, past: int) -> dict[str, Any]:
    """Return the arguments of a trunk for tokens first .. last - 1, after so many that are in the cache already."""
    cut = dict(given)
    for name in _BY_TOKEN:
        if given.get(name) is not None:
            cut[name] = given[name][:, first:last]
    if given.get("cache_position") is not None:
        cut["cache_position"] = given["cache_position"][first:last]
    if given.get("attention_mask") is not None:
        cut["attention_mask"] = given["attention_mask"][:, : past + last]
    return cut


def make_cached_forwards(model: Any, quantizer: CacheConfig) -> tuple[list[CachedForward], dict[str, Any]]:
    """Return the forwards by which a model has a quantized cache, and what is to be recorded. Nothing is changed.

    Raises:
        ValueError: the model keeps no such cache, or blocks do not fit: says why.
    """
    trunk = model.base_model
    if find_cache_name(trunk.forward) not in inspect.signature(trunk.forward).parameters:
        raise ValueError(f"{_ROLE}: {type(model).__name__} keeps no cache of keys and values")
    bits = count_cache_bits(_probe(model, trunk, quantizer), quantizer)
    modules = {id(module): module for module in (trunk, trunk.get_decoder())}  # OPT's model goes past its trunk
    return [CachedForward(module, quantizer) for module in modules.values()], {"cache_bits_per_value": bits}


@torch.no_grad()
def _probe(model: Any, trunk: Any, quantizer: CacheConfig) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values that each layer with a cache stores of a few tokens.

    Raises:
        ValueError: there is none, or a layer's cache is of another kind than blocks of tokens are for.
    """
    cache = DynamicCache(config=trunk.config)
    tokens = torch.arange(_PROBE, device=model.device)[None] % count_embedded(model)
    with in_evaluation_mode(model):
        trunk(tokens, **{find_cache_name(trunk.forward): cache})
    kept: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if not kept:
        raise ValueError(f"{_ROLE}: {type(model).__name__} puts no keys and values into transformers' cache")
    if quantizer.has_blocks_of_tokens and (others := {type(layer).__name__ for layer in kept if not _grows(layer)}):
        raise ValueError(f"{_ROLE}: keys or values per channel need full attention, and there is {', '.join(others)}")
    return [(layer.keys, layer.values) for layer in kept]


def _grows(layer: object) -> bool:
    """Whether a layer's cache keeps every token."""
    return type(layer) is DynamicLayer


def count_cache_bits(layers: Iterable[tuple[Tensor, Tensor]], quantizer: CacheConfig) -> float:
    """Return the mean bits of a stored number, scales included, for the keys and values of each layer.

    Raises:
        ValueError: a block is longer than a head of some layer.
    """
    numbers, bits = 0, 0.0
    for keys, values in layers:
        for states, axis in ((keys, quantizer.keys), (values, quantizer.values)):
            _, heads, _, size = states.shape
            if axis == "token":
                check_blocks(_ROLE, quantizer, size, f"a token has {size} numbers in one head")
            numbers += heads * size
            bits += heads * size * _count_bits(states, quantizer, axis)
    return bits / numbers


def _count_bits(states: Float[Tensor, "batch heads tokens channels"], quantizer: CacheConfig, axis: str) -> float:
    """Return the bits of a stored number of one layer, scales included."""
    spec, row = (quantizer, states.shape[-1]) if axis == "token" else (quantizer.of_channels, quantizer.block_tokens)
    return spec.count_bits((1, row)) / row
