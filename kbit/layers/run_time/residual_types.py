"""Which models a rotation of the residual stream is for, known before they are loaded: nothing here needs torch."""

from __future__ import annotations

from typing import Final

# Model types whose norms are RMSNorm with a factor `weight`, before what reads the stream and nowhere else on its way.
RESIDUAL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3")


def check_residual(model_type: str | None, name: str) -> None:
    """Raise ValueError if the residual stream of a model of this type cannot be rotated.

    Args:
        model_type: the type that the model's configuration names.
        name: the model in the message.
    """
    if model_type not in RESIDUAL_TYPES:
        raise ValueError(
            f"quant.rotation=residual is not for {name} (model_type {model_type!r}): its norms must be RMSNorm before "
            f"what they feed and nowhere else, as in {', '.join(RESIDUAL_TYPES)}. quant.rotation=hadamard is for any "
            "architecture"
        )
