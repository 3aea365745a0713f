"""Fused experts whose weights are packed: one expert is dequantized at a time, when the model asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.numerics.quantized_tensor import QuantizedTensor


class QuantizedExperts(nn.ModuleList):
    """The weight of fused experts, [experts, out, in] or transposed, in the place of the module's parameter.

    The model's own eager forward takes one expert's matrix by its number (Mixtral, GPT-OSS, Qwen-MoE). The other
    implementations that transformers has for experts take the whole parameter, which there is none of.

    Attributes:
        is_transposed: whether the module has its matrices as [in, out], as GPT-OSS does.
        like: an empty tensor in the model's dtype, which moves with the model.
    """

    like: Tensor

    def __init__(
        self, layouts: Sequence[PackedLayout], *, is_transposed: bool, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Make a weight whose tensors are still to be filled, by `put` or from a state_dict.

        The model gets matrices of this dtype, or of the dtype to which it is moved later. None is the weight's.
        """
        super().__init__(PackedWeight(layout, device) for layout in layouts)
        self.is_transposed = is_transposed
        self.register_buffer("like", torch.empty(0, dtype=dtype or layouts[0].dtype), persistent=False)

    def put(self, experts: Sequence[QuantizedTensor]) -> Self:
        """Take over the tensors of the experts' codes, without a copy."""
        for weight, q in zip(self.children(), experts, strict=True):
            assert isinstance(weight, PackedWeight)
            weight.put(q)
        return self

    def __getitem__(self, number: int | Tensor) -> Tensor:  # type: ignore[override]
        """Return the matrix of one expert, dequantized, as the module has it and in the model's dtype."""
        return self.restore(int(number)).to(self.like.dtype)

    def restore(self, number: int) -> Tensor:
        """Return the matrix of one expert as the module had it, in its dtype before."""
        weight: Any = super().__getitem__(number)
        matrix: Tensor = weight.dequantize()
        return matrix.t().contiguous() if self.is_transposed else matrix
