"""Puts outlier features of known dimensions into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def plant_features(model: Any, dimensions: list[int], scale: float = 64.0, layers: Sequence[int] | None = None) -> None:
    """Scale dimensions up after OPT's norms and down in the next weights.

    The model computes the same function as before.
    """
    every = model.model.decoder.layers
    for layer in every if layers is None else (every[i] for i in layers):
        attention = layer.self_attn
        for norm, readers in [
            (layer.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.final_layer_norm, [layer.fc1]),
        ]:
            with torch.no_grad():
                norm.weight[dimensions] *= scale
                norm.bias[dimensions] *= scale
                for reader in readers:
                    reader.weight[:, dimensions] /= scale
