"""Rotation of the residual stream, for models whose norms let it through (QuaRot, Ashkboos et al. 2024).

A root mean square does not change by a rotation R, so that RMSNorm(x R) = RMSNorm(x) R but for the gain g of the norm.
With the gains in the matrices that read the stream, the whole stream can be rotated:

    matrices that read it     W diag(g) R        with inputs x diag(g)^-1 R
    matrices that write to it R^T W H            with inputs x H, a Hadamard matrix of their own size
    embedding                 E R
    head, if it is its own    E diag(g) R        g of the last norm. A tied head has the embedding's E R.

These are what is quantized. As in kbit.layers.run_time.rotation, the model holds them turned back, so that its norms,
its tied embedding and what counts as quantized are as they were. A model that is rotated in fact gives the same, but
for a tied head that a rule quantizes: E R lacks the last norm's gain, so that such a model has to turn back before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from kbit.layers.run_time.residual_types import check_residual
from kbit.layers.run_time.rotation import Basis, make_rotation
from kbit.models.architectures import list_decoder_layers

FindBasis = Callable[[str, int], Basis | None]
_NORMS: Final = ("input_layernorm", "post_attention_layernorm")  # before attention, before the feed-forward layer


def find_bases(model: nn.Module, kind: str | None, seed: int) -> FindBasis:
    """Return the function from a weight's name and its number of inputs to what it is turned by.

    Args:
        model: the model.
        kind: None, hadamard (the inputs of each product) or residual.
        seed: the seed of the random signs.

    Raises:
        ValueError: residual, and the model's architecture does not allow it, or a norm's gain holds zeros.
    """
    if kind is None:
        return lambda name, inputs: None
    own = _find_stream(model, seed) if kind == "residual" else {}
    return lambda name, inputs: own.get(name) or Basis(make_rotation(inputs, seed))


def _find_stream(model: Any, seed: int) -> dict[str, Basis]:
    """Return what the weights are turned by that read the residual stream or write to it, by their names."""
    check_residual(getattr(getattr(model, "config", None), "model_type", None), type(model).__name__)
    stream = make_rotation(model.config.hidden_size, seed)
    bases: dict[str, Basis] = {}
    for layer in list_decoder_layers(model):
        path = layer.attention_out.rpartition(".self_attn.")[0]
        for norm, readers in zip(_NORMS, (layer.attention, layer.feed_forward), strict=True):
            gain = _get_gain(model, f"{path}.{norm}")
            bases |= {f"{name}.weight": Basis(stream, gain) for name in readers}
        for name in (layer.attention_out, layer.feed_forward_out):
            inputs = model.get_parameter(f"{name}.weight").shape[-1]
            bases[f"{name}.weight"] = Basis(make_rotation(inputs, seed), outputs=stream)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter is embedding:
            bases[name] = Basis(stream)
        elif parameter is head:
            bases[name] = Basis(stream, _get_gain(model, f"{model.base_model_prefix}.norm"))
    return bases


def _get_gain(model: nn.Module, norm: str) -> Tensor:
    """Return a norm's gain.

    Raises:
        ValueError: it has zeros, by which inputs cannot be divided.
    """
    gain = model.get_parameter(f"{norm}.weight").detach()
    if zeros := int((gain == 0).sum()):
        raise ValueError(
            f"quant.rotation=residual divides inputs by the gains of norms, and {norm}.weight holds {zeros} zeros: "
            "take quant.rotation=hadamard"
        )
    return gain
