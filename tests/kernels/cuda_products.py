"""Products with packed matrices by the CUDA kernel, against float64 products with the dequantized matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.kernels import cuda_linear
from kbit.layers.fused import make_matrix
from kbit.numerics.quantizer import quantize
from kbit.numerics.spec import QuantSpec

Array = NDArray[Any]
Case = tuple[int, tuple[int, int], dict[str, Any]]

# every kind of constants, blocks across and within rows, each number of bits, batch and an odd number of rows
CASES: tuple[Case, ...] = (
    (1, (3, 64), {"bits": 4, "data_type": "nf", "block_size": 64}),
    (2, (2, 48), {"bits": 3, "data_type": "int", "block_size": 32, "scale_format": "bf16", "normalization": "minmax"}),
    (1, (2, 80), {"bits": 5, "data_type": "nf", "block_size": 32, "layout": "row", "scale_format": "fp32"}),
    (1, (5, 32), {"bits": 2, "data_type": "int", "block_size": None, "scale_format": "dq8"}),
    (1, (3, 32), {"bits": 6, "data_type": "dynamic", "block_size": 16, "scale_format": "fp8", "centering": True}),
    (4, (2, 32), {"bits": 7, "data_type": "float", "block_size": 16, "scale_format": "e8m0"}),
    (8, (2, 32), {"bits": 8, "data_type": "int", "block_size": 32, "normalization": "signed_absmax"}),
)


def find_wrong_products(
    put: Callable[[Array], Any], get: Callable[[Any], Array], cases: Sequence[Case] = CASES
) -> list[str]:
    return [wrong for case in cases for wrong in _find_wrong(*case, put, get)]


def _find_wrong(
    batch: int, shape: tuple[int, int], fields: dict[str, Any], put: Callable[[Array], Any], get: Callable[[Any], Array]
) -> Iterator[str]:
    random = torch.Generator().manual_seed(batch)
    q = quantize(torch.randn(shape, generator=random), QuantSpec(**fields))
    x = torch.randn(batch, shape[1], generator=random)
    matrix = make_matrix(q)
    constants = [c._replace(stored=put(c.stored), second=put(c.second)) for c in (matrix.scales, matrix.offsets)]
    matrix = matrix._replace(codes=put(matrix.codes), scales=constants[0], offsets=constants[1])
    y = get(cuda_linear.multiply(put(x.numpy().ravel()), matrix)).reshape(batch, -1)
    w = q.dequantize().double()
    error = np.abs(y - (x.double() @ w.t()).numpy()).max() / float(w.norm(dim=1).max())
    if not error < 1e-6:
        yield f"{fields}: {error}"
