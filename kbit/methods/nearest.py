"""Round to nearest, without data: each block with its usual scale, or with the scale of least squared error.

rtn   The usual scale maps a block's largest magnitude to the codebook's end.
mse   Of many scales, each block takes the one with the least squared error (kbit.methods.block_scales).
"""

from __future__ import annotations

from collections.abc import Iterator

from kbit.methods.block_scales import BlockScales, find_best_scales
from kbit.methods.weight import Codes, Job, Weight
from kbit.numerics.quantizer import quantize


def round_to_nearest(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with the codes of kbit.quantize."""
    for weight in job.weights:
        with weight.outliers_at_zero() as values:
            codes = quantize(values, weight.spec)
        yield weight, codes


def search_scales(job: Job) -> Iterator[tuple[Weight, Codes]]:
    """Yield each weight with codes for the best scale of each block."""
    for weight in job.weights:
        matrix = weight.copy_matrix()
        blocks = BlockScales(matrix, weight.spec)
        best = find_best_scales(matrix, blocks)
        yield weight, blocks.encode(matrix, best, weight.values.shape, weight.values.dtype)
