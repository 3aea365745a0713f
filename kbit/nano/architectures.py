"""The four architectures that the paper studied, at sizes of 0.1 to 7 million block parameters.

A size is named after the parameters of its block matrices, 12 d^2 L, which is the part that gets quantized. Everything
that defines a family is as in its original. Only the sizes, the vocabulary and the context are small. Embeddings are
tied where the original ties them (GPT-2, OPT, BLOOM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, OPTConfig, PreTrainedConfig

from kbit.checks import check_choice
from kbit.nano.data import VOCABULARY

Fields = dict[str, Any]

CONTEXT: Final = 256  # tokens


@dataclass(frozen=True)
class Size:
    """A size and the learning rate that it is trained with.

    Attributes:
        hidden: width d.
        layers: number of decoder layers L.
        heads: attention heads.
        peak_lr: highest learning rate of AdamW.
        tokens: training length of the shipped models of this size.
    """

    hidden: int
    layers: int
    heads: int
    peak_lr: float
    tokens: int


SIZES: Final[dict[str, Size]] = {
    "98k": Size(64, 2, 2, 4e-3, 20_000_000),
    "332k": Size(96, 3, 3, 3e-3, 20_000_000),
    "1m": Size(144, 4, 4, 2e-3, 20_000_000),
    "3m": Size(224, 5, 7, 1.5e-3, 20_000_000),
    "7m": Size(320, 6, 8, 1e-3, 16_000_000),
}
FAMILIES: Final = ("neox", "gpt2", "opt", "bloom")


def make_config(family: str, size: str) -> PreTrainedConfig:
    """Return the transformers configuration of a family's size. It has no dropout, because no text is seen often.

    Raises:
        ValueError: the family or the size does not exist.
    """
    check_choice("family", family, FAMILIES)
    check_choice("size", size, tuple(SIZES))
    width, layers, heads = SIZES[size].hidden, SIZES[size].layers, SIZES[size].heads
    # Configurations call the same thing by different names. OPT's pad_token_id=1 would freeze the embedding of "!".
    common: Fields = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    usual: Fields = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    match family:
        case "neox":
            usual |= {"intermediate_size": 4 * width, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
            rotary: Fields = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
            return GPTNeoXConfig(**common, **usual, rope_parameters=rotary)
        case "gpt2":
            named: Fields = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": CONTEXT}
            named |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            # the same function as gelu_new, computed in one step
            return GPT2Config(**common, **named, activation_function="gelu_pytorch_tanh")
        case "opt":
            usual |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "max_position_embeddings": CONTEXT}
            return OPTConfig(**common, **usual, dropout=0.0)
        case _:
            named = {"hidden_size": width, "n_layer": layers, "n_head": heads, "seq_length": CONTEXT}
            return BloomConfig(**common, **named)


def build_model(family: str, size: str, seed: int) -> Any:
    """Return a model with random float32 weights, the same for the same seed, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = make_config(family, size)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.train()
