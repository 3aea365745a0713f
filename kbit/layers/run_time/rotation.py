"""Rotations of a product's inputs by random-sign Hadamard matrices, which spread outliers over all inputs.

    x W^T = (x R) (W R)^T,     R = diag(s) H / sqrt(b),     s in {-1, 1}^n,     H H^T = b I   (QuIP#, QuaRot)

Where n is no order of a known Hadamard matrix, H is block-diagonal with blocks of b inputs, where b is the largest
divisor of n that is one. Known orders are m 2^k with m = 1, or by Paley's constructions from a prime p: m = p + 1 for
p = 3 mod 4, and m = 2 (p + 1) for p = 1 mod 4.

W R is what is quantized, and x R too if activations are. What is stored in the model, and multiplied, is rotated back:
x (Q(W R) R^T)^T is the product of the rotated model to within rounding, in any architecture. A Basis says the same of a
model whose residual stream is rotated (kbit.layers.run_time.residual).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

_LARGEST_PALEY: Final = 512  # a matrix of this order is multiplied as it is


@dataclass(frozen=True)
class Rotation:
    """A rotation of vectors with n numbers.

    Attributes:
        signs: [n], -1 or 1.
        block: the order of the Hadamard matrix, a divisor of n.
    """

    signs: Tensor
    block: int

    def rotate(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return x R, float32 (float64 stays)."""
        x = _widen(x)
        return self._multiply(x * self.signs.to(x), transposed=False)

    def rotate_back(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return x R^T, float32 (float64 stays)."""
        x = _widen(x)
        return self._multiply(x, transposed=True) * self.signs.to(x)

    def _multiply(self, x: Float[Tensor, "*batch n"], *, transposed: bool) -> Float[Tensor, "*batch n"]:
        """Return x by the blocks of H / sqrt(b), or of its transpose. H is the product of Sylvester's and Paley's."""
        order = find_paley_order(self.block)
        paley = torch.from_numpy(make_paley(order)).to(x)
        parts = x.reshape(*x.shape[:-1], -1, self.block // order, order) @ (paley.T if transposed else paley)
        half = 1
        while half < parts.shape[-2]:  # the fast Walsh-Hadamard transform, which is its own transpose
            pairs = parts.reshape(*parts.shape[:-2], -1, 2, half, order)
            first, second = pairs.unbind(-3)
            parts = torch.stack([first + second, first - second], dim=-3).flatten(-4, -2)
            half *= 2
        return parts.reshape(x.shape) / math.sqrt(self.block)


@dataclass(frozen=True)
class Basis:
    """What a product's weight and inputs are turned by before they are quantized, and back by afterwards.

        x W^T = x' W'^T S^T,    x' = x diag(g)^-1 R,    W' = S^T W diag(g) R

    Attributes:
        inputs: R, or None.
        gain: g, [in], the gain of the norm that x comes from, or None.
        outputs: S, or None.
    """

    inputs: Rotation
    gain: Tensor | None = None
    outputs: Rotation | None = None

    def turn_weight(self, w: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """Return W', float32 (float64 stays)."""
        w = self.inputs.rotate(w if self.gain is None else _widen(w) * self.gain.to(_widen(w)))
        return w if self.outputs is None else self.outputs.rotate(w.mT).mT.contiguous()

    def turn_weight_back(self, w: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """Return W of W', float32 (float64 stays)."""
        w = self.inputs.rotate_back(w if self.outputs is None else self.outputs.rotate_back(w.mT).mT)
        return w if self.gain is None else w / self.gain.to(w)

    def turn_inputs(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return x', float32 (float64 stays)."""
        return self.inputs.rotate(x if self.gain is None else _widen(x) / self.gain.to(_widen(x)))

    def turn_inputs_back(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return x of x', float32 (float64 stays)."""
        x = self.inputs.rotate_back(x)
        return x if self.gain is None else x * self.gain.to(x)

    def turn_square(self, h: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """Return sum x'^T x' of H = sum x^T x."""
        return self.turn_inputs(self.turn_inputs(h).T).T


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def make_rotation(size: int, seed: int) -> Rotation:
    """Return the rotation of inputs of this size. Products that share inputs have the same one."""
    signs = np.random.default_rng([seed, size]).integers(0, 2, size) * 2 - 1
    return Rotation(torch.from_numpy(signs), find_block(size))


@functools.cache
def find_block(size: int) -> int:
    """Return the largest divisor of a size that is the order of a known Hadamard matrix."""
    return max(b for b in range(1, size + 1) if size % b == 0 and find_paley_order(b))


def find_paley_order(order: int) -> int:
    """Return m of an order m 2^k, the least one whose matrix is known: 1 for powers of two, 0 if there is none."""
    odd = order // (order & -order)
    if odd == 1:
        return 1
    orders = (odd << k for k in range(2, order.bit_length()))
    known = (m for m in orders if order % m == 0 and (_is_first_kind(m) or _is_second_kind(m)))
    return next((m for m in known if m <= _LARGEST_PALEY), 0)


def _is_first_kind(m: int) -> bool:
    return m % 4 == 0 and _is_prime(m - 1)


def _is_second_kind(m: int) -> bool:
    return m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _is_prime(m // 2 - 1)


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))


@functools.cache
def make_paley(order: int) -> NDArray[np.float64]:
    """Return the Hadamard matrix of order 1, or of Paley's first or second kind: entries -1 and 1, H H^T = order I."""
    if order == 1:
        return np.ones((1, 1))
    if _is_first_kind(order):
        return np.eye(order) + _border(order - 1, skew=True)
    conference = _border(order // 2 - 1, skew=False)
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(conference, plus) + np.kron(np.eye(order // 2), minus)


def _border(p: int, *, skew: bool) -> NDArray[np.float64]:
    """Return Jacobsthal's matrix of a prime with a border of ones: C C^T = p I, C^T = -C or C."""
    squares = {i * i % p for i in range(1, p)}
    character = np.array([0, *(1 if i in squares else -1 for i in range(1, p))])
    c = np.zeros((p + 1, p + 1))
    c[1:, 1:] = character[(np.arange(p)[:, None] - np.arange(p)) % p]
    c[0, 1:], c[1:, 0] = 1, -1 if skew else 1
    return c
