"""Linear layers and embeddings that compute with packed k-bit weights.

A product takes one of two paths. For a few rows of inputs (tokens), a fused kernel decodes the codes on the way, and
no dequantized weight exists. For more rows, a tile of the weight's rows is dequantized, which stays in the cache, and
torch multiplies by it: the same bits as with the whole dequantized weight.

The fused path computes in float32 with codebook[code] * scale + offset. It does not round these weights to the model's
dtype, as dequantizing does. So in 16 bits its products differ from those of tiles by the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from kbit.kernels import cpu_linear
from kbit.kernels.cpu_linear import BATCHES, Matrix
from kbit.kernels.simd import find_isa
from kbit.layers.fused import can_fuse, make_matrix
from kbit.layers.packed_weight import PackedLayout, PackedWeight
from kbit.numerics.backend import choose_backend
from kbit.numerics.quantized_tensor import QuantizedTensor
from kbit.numerics.tiles import Tiles

# Up to so many rows of inputs, in float32 and in 16 bits, the fused path is taken. On AVX2 it was measured to be faster
# than tiles (FINDINGS.md). AVX-512's rows are those of a prototype of the same instructions, and generic's are assumed.
# On AVX2 torch's 16-bit products are slow, and no end was found up to 256 rows.
FUSED_ROWS: Final = {"avx512": (32, 8), "avx2": (64, 256), "generic": (8, 8)}


class QuantizedLinear(PackedWeight):
    """A linear layer, or a Conv1D, whose weight [out, in] is packed: y = x W^T + bias in x's dtype.

    Attributes:
        bias: the layer's bias in its own dtype, or None.
        fused_rows: up to so many rows of inputs take the fused path, if the weight's rows and blocks are multiples of
            16. None is FUSED_ROWS. 0 is never: products then have the bits of the plain layer's. Inputs in float64
            always take tiles, as the fused path computes in float32.
        is_conv1d: whether it stands for a Conv1D, whose products have the weight stored as [in, out].
    """

    bias: nn.Parameter | None

    def __init__(
        self, layout: PackedLayout, bias: nn.Parameter | None = None, *, is_conv1d: bool = False,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Make a layer whose weight is still to be filled, by `put` or from a state_dict."""
        super().__init__(layout, device)
        if len(layout.shape) != 2:
            raise ValueError(f"a weight of shape {layout.shape} is no matrix [out, in] of a linear layer")
        self.out_features, self.in_features = layout.shape
        self.is_conv1d = is_conv1d
        self.fused_rows: int | None = None
        self.register_parameter("bias", bias)
        self._is_fusible = can_fuse(layout.spec, layout.shape)
        self._matrix: tuple[tuple[tuple[int, int], ...], Matrix, QuantizedTensor] | None = None
        self._tied: tuple[PackedWeight, ...] = ()  # the embedding whose tensors these are: a tuple is no submodule
        self.register_load_state_dict_post_hook(_forget_matrix)  # type: ignore[no-untyped-call]

    @classmethod
    def from_codes(cls, q: QuantizedTensor, layer: nn.Module) -> QuantizedLinear:
        """Return the layer that takes the place of nn.Linear or Conv1D, with its bias and the codes of its weight."""
        bias: Any = getattr(layer, "bias", None)
        made = cls(PackedLayout.of(q), bias, is_conv1d=isinstance(layer, Conv1D), device="meta").put(q)
        return made.train(layer.training)

    def put(self, q: QuantizedTensor) -> Self:
        """Take over the tensors of a quantized tensor of the same layout. The layer is tied to no embedding then."""
        self._tied = ()
        return super().put(q)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x W^T + bias."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs of shape {tuple(x.shape)} do not end in the layer's {self.in_features} inputs")
        if not x.is_floating_point():
            raise TypeError(
                f"inputs of {x.dtype} are no numbers for a packed layer: the model casts them to its weight's dtype, "
                "which is that of bytes. Leave this layer out by quant.exclude"
            )
        rows = x.reshape(-1, self.in_features)
        has_gradient = rows.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not (has_gradient and torch.is_grad_enabled()):
            return self.multiply(rows).view(*x.shape[:-1], self.out_features)
        y: Tensor = _Product.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def choose_path(self, rows: int, dtype: torch.dtype = torch.float32) -> str:
        """Return how the product of so many rows of inputs of this dtype is computed: fused or tile."""
        return "fused" if 0 < rows <= self.find_most_fused(dtype) else "tile"

    def find_most_fused(self, dtype: torch.dtype) -> int:
        """Return up to how many rows of inputs of this dtype take the fused path."""
        if not self._is_fusible or dtype == torch.float64:
            return 0
        most = FUSED_ROWS[find_isa().name][dtype != torch.float32] if self.fused_rows is None else self.fused_rows
        return most if self.weight.device.type == "cpu" else min(most, BATCHES[-1])

    def multiply(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Return x W^T + bias, without a gradient."""
        return self._multiply_fused(x) if self.choose_path(len(x), x.dtype) == "fused" else self._multiply_tiles(x)

    def _multiply_fused(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        (matrix, q), inputs = self._find_matrix(), x.detach().float()
        if q.outlier_columns is not None:  # their codes mean nothing
            inputs = inputs.index_fill(1, q.outlier_columns, 0.0)
        if q.input_scales is not None:
            inputs = inputs / q.input_scales.float()
        y = _multiply_on_device(inputs.contiguous(), matrix)
        if q.outlier_columns is not None and q.outlier_values is not None:
            y += x.detach()[:, q.outlier_columns].float() @ q.outlier_values.float().t()
        if self.bias is not None:
            y += self.bias.detach()
        return y.to(x.dtype)

    def _find_matrix(self) -> tuple[Matrix, QuantizedTensor]:
        """Return the weight as the kernels take it, made anew when a tensor was replaced or written to."""
        state = tuple((tensor.data_ptr(), _count_writes(tensor)) for tensor in (self.weight, *self.buffers()))
        if self._matrix is None or self._matrix[0] != state:
            q = self.quantized
            self._matrix = state, make_matrix(q), q
        return self._matrix[1:]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the layer. What was made of the old tensors is dropped, and a tied embedding's move as one with them."""
        self._matrix = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for source in self._tied:
            self.share(source._apply(fn))  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickle, without what is in the same memory as the tensors."""
        return self.__dict__ | {"_matrix": None}

    def tie(self, embedding: QuantizedEmbedding) -> None:
        """Let the layer have the tensors of an embedding of the same layout, also after either is moved."""
        self._tied = (embedding,)
        self.share(embedding)

    def _multiply_tiles(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        y = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        if x.dtype == torch.float16 and x.device.type == "cpu" and self.fused_rows != 0:
            x = x.float()  # torch's float16 products are several times slower there
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        for rows, tile in Tiles(self.quantized):
            values = tile.to(x.dtype)
            part = None if bias is None else bias[rows]
            y[:, rows] = self._multiply_tile(x, values, part)
        return y

    def multiply_gradient(self, gradient: Float[Tensor, "rows out"]) -> Float[Tensor, "rows in"]:
        """Return gradient W, which is the gradient with respect to x, summed in float32 and rounded once."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = wide.new_zeros(len(gradient), self.in_features)
        for rows, tile in Tiles(self.quantized):
            total += wide[:, rows] @ tile.to(wide.dtype)
        return total.to(gradient.dtype)

    def _multiply_tile(
        self, x: Float[Tensor, "rows in"], tile: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "rows out"]:
        if not self.is_conv1d or bias is None:
            return F.linear(x, tile, bias)
        return torch.addmm(bias, x, tile.t().contiguous())  # as Conv1D: for few rows, its last digits differ

    def extra_repr(self) -> str:
        """Return what the layer is, for print(model)."""
        wide, narrow = (self.find_most_fused(dtype) for dtype in (torch.float32, torch.bfloat16))
        fused = f"fused up to {wide} rows" if wide else "tiles only"
        if wide != narrow:
            fused += f" in float32, {narrow} in 16 bits"
        return f"{super().extra_repr()}, bias={self.bias is not None}, {fused}"


def _count_writes(tensor: Tensor) -> int:
    """Return how often a tensor was written to. Torch does not count it of tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _forget_matrix(layer: QuantizedLinear, _: Any) -> None:
    """Forget what was made of tensors that have other values now."""
    layer.__dict__["_matrix"] = None


def _multiply_on_device(x: Float[Tensor, "rows in"], matrix: Matrix) -> Float[Tensor, "rows out"]:
    """Return x W^T by the kernels of x's device."""
    if not choose_backend(x.device).is_gpu:
        return torch.from_numpy(cpu_linear.multiply(x.numpy(), matrix, torch.get_num_threads()))
    cuda_linear = import_module("kbit.kernels.cuda_linear")  # on first use: it needs the extra kbit[cuda]
    batch = next(size for size in BATCHES if size >= len(x))
    padded = F.pad(x, (0, 0, 0, batch - len(x)))
    products: Tensor = cuda_linear.multiply(padded.view(-1), matrix)
    return products.view(batch, matrix.rows)[: len(x)]


class _Product(torch.autograd.Function):
    """A quantized layer's product, with gradients to the inputs and the bias. The weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wants_x, wants_bias, _ = ctx.needs_input_grad
        of_x = ctx.layer.multiply_gradient(gradient) if wants_x else None
        return of_x, gradient.sum(0) if wants_bias else None, None


class QuantizedEmbedding(PackedWeight):
    """An embedding whose rows are packed. Only the rows that are asked for are dequantized.

    Attributes:
        like: an empty tensor in the model's dtype, which is also that of the rows. It moves with the model.
    """

    like: Tensor

    def __init__(
        self, layout: PackedLayout, padding_idx: int | None = None, *, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Make an embedding whose weight is still to be filled, by `put` or from a state_dict.

        It gives rows of this dtype, or of the dtype to which the model is moved later. None is the weight's.
        """
        super().__init__(layout, device)
        self.register_buffer("like", torch.empty(0, dtype=dtype or layout.dtype), persistent=False)
        self.num_embeddings, self.embedding_dim = layout.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_codes(cls, q: QuantizedTensor, embedding: nn.Module) -> QuantizedEmbedding:
        """Return the embedding that takes the place of nn.Embedding."""
        padding: Any = getattr(embedding, "padding_idx", None)
        dtype: Any = getattr(getattr(embedding, "weight", None), "dtype", None)
        return cls(PackedLayout.of(q), padding, dtype=dtype, device="meta").put(q).train(embedding.training)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:
        """Return the rows of these tokens in the model's dtype."""
        flat = tokens.reshape(-1).long()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"a token is not in 0..{self.num_embeddings - 1}")
        return Tiles(self.quantized).gather(flat).to(self.like.dtype).view(*tokens.shape, self.embedding_dim)

    def make_head(self, bias: nn.Parameter | None = None) -> QuantizedLinear:
        """Return the output layer that is tied to this embedding: its tensors are the same."""
        head = QuantizedLinear(self.layout, bias, device="meta")
        head.tie(self)
        return head
