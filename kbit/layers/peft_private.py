"""peft's adapters beside packed layers. peft knows layers by their class, and takes others by a private call alone."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from kbit.layers.quantized_linear import QuantizedLinear


class PackedLora(Linear):
    """A LoRA adapter beside a packed layer: y = QuantizedLinear(x) + B A x scaling. Gradients reach A, B and x."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with warnings.catch_warnings():  # peft does not know the class, which has all that it asks of one
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*arguments, **options)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to merge the adapter: codes take no further summand.

        Raises:
            ValueError: always.
        """
        raise ValueError("an adapter cannot be merged into packed codes: model.dequantize() first, or keep it beside")


def adapt_packed_layers(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration of peft take packed layers, and return it.

        model = peft.get_peft_model(packed, kbit.adapt_packed_layers(peft.LoraConfig(target_modules=["q_proj"])))

    Args:
        config: peft's LoraConfig, whose target_modules name packed layers.
    """
    config._register_custom_module({QuantizedLinear: PackedLora})
    return config
