"""Linear layers that train with quantized operands in their three matrix products.

A linear layer with inputs X [tokens, in], weights W [out, in] and the gradient G [tokens, out] of its output computes

    output             Y  = X W^T     summed over the inputs
    inputs' gradient   dX = G W       summed over the outputs
    weights' gradient  dW = G^T X     summed over the tokens

Each operand has a role (weights, activations, gradients), and each role may have a quantizer. An operand is quantized
anew for each product, with its blocks along the dimension that the product sums, as hardware for block formats needs
it (Zhang et al. 2022, "FAST"; OCP Microscaling). Block floating point, MX, NVFP4 and int8 rows are quantizers of this
one mechanism.

Where gradients have no quantizer, the backward products take the very operands of the forward product: the gradient
goes straight through the rounding. With a quantizer for weights alone this is quantization-aware training, and the
weights of the forward product are those that quantize_model makes.

Sums are computed in the layer's own dtype. This is a simulation of the numbers, not of the speed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from kbit.layers.run_time.transient import check_blocks, check_transient, explain_refusal, with_own_seed
from kbit.models.parameters import OUTSIDE, as_matrix, find_towers, is_experts, why_outside
from kbit.numerics.quantizer import fake_quantize
from kbit.numerics.spec import BASELINE_BITS, QuantSpec

IN_DECODER_LAYERS: Final = r"\.\d+\."  # a numbered member of a list such as layers or h


@dataclass(frozen=True)
class Roles:
    """The quantizer of each operand. None, or 16 bits, does not quantize it.

    Raises:
        ValueError: a quantizer that its role cannot have.
    """

    weights: QuantSpec | None = None
    activations: QuantSpec | None = None
    gradients: QuantSpec | None = None

    def __post_init__(self) -> None:
        for role in dataclasses.fields(self):
            spec: QuantSpec | None = getattr(self, role.name)
            if spec is None or spec.is_baseline:
                object.__setattr__(self, role.name, None)
            elif role.name != "weights":
                check_transient(role.name, spec, is_gradient=role.name == "gradients")

    @property
    def possible(self) -> tuple[Roles, ...]:
        """These roles, as the only choice of a policy."""
        return (self,)

    def choose(self, role: str, use: Use, values: Tensor) -> QuantSpec | None:
        """Return the quantizer of a role, whatever the values."""
        spec: QuantSpec | None = getattr(self, role)
        return spec


class Policy(Protocol):
    """What chooses the quantizer of each operand. Roles always choose the same, Fast looks at the values."""

    @property
    def possible(self) -> tuple[Roles, ...]:
        """All roles that may be chosen, so that their blocks can be checked before training."""

    def choose(self, role: str, use: Use, values: Float[Tensor, "rows columns"]) -> QuantSpec | None:
        """Return the quantizer of an operand, or None.

        Args:
            role: weights, activations or gradients.
            use: the layer and the step.
            values: the operand, with the dimension in columns that its first product sums.
        """


@dataclass(frozen=True)
class Use:
    """One use of a layer in a training: what policies decide by, and what random numbers depend on.

    Attributes:
        name: the layer's name in the model.
        number: the layer's number among the quantized ones, from 0.
        layers: the number of quantized layers.
        step: the step of the training, from 0.
        steps: the number of steps of the training, or None while begin_step was never called.
        replica: the number of the replica that computes, or of the micro-batch that stands for it.
        count: how often the layer was used in this step before, in training or in evaluation alone.
        trains: whether gradients are computed. What is only evaluated is not counted as training.
    """

    name: str
    number: int
    layers: int
    step: int
    steps: int | None
    replica: int
    count: int
    trains: bool

    def round(self, values: Tensor, spec: QuantSpec | None, product: str, role: str) -> Tensor:
        """Return an operand of a product, quantized with random numbers of this use's own.

        Args:
            values: the operand, with the dimension in columns that the product sums.
            spec: its quantizer, or None.
            product: the product: output, inputs or weights, of which it computes the value or the gradient.
            role: the operand's role.

        Raises:
            FloatingPointError: a value is NaN or Inf, as those of a training that diverges are.
            ValueError: a block is beyond the scales' range.
        """
        if spec is None:
            return values
        count = f"{self.count}" if self.trains else f"evaluated/{self.count}"
        label = f"{self.name}/{product}/{role}/{self.step}/{self.replica}/{count}"
        try:
            return fake_quantize(values, with_own_seed(spec, label))
        except ValueError as error:
            raise self.explain(values, role, error) from error

    def explain(self, values: Tensor, role: str, error: ValueError) -> Exception:
        """Return the error of an operand that no quantizer takes, with its place."""
        return explain_refusal(values, f"{self.name}, step {self.step}, {role}", error)


@dataclass
class PassCounter:
    """Work of the products on hardware that multiplies 2-bit chunks (FAST, section 4).

    A magnitude of m bits has ceil(m / 2) chunks, and a multiply-accumulate needs a pass for each pair of chunks.

    Attributes:
        macs: multiply-accumulates.
        passes: their passes.
    """

    macs: int = 0
    passes: int = 0

    def add(self, macs: int, left: QuantSpec | None, right: QuantSpec | None) -> None:
        """Count a product of two operands."""
        self.macs += macs
        self.passes += macs * count_chunks(left) * count_chunks(right)

    @property
    def passes_per_mac(self) -> float:
        """Passes of a multiply-accumulate on average, NaN before the first one."""
        return self.passes / self.macs if self.macs else math.nan


def count_chunks(spec: QuantSpec | None) -> int:
    """Return the 2-bit chunks of an operand's magnitude: those of its bits but the sign's. None has 16 bits."""
    return math.ceil(((BASELINE_BITS if spec is None else spec.bits) - 1) / 2)


@dataclass
class QuantizedProducts:
    """A model whose linear layers compute with quantized operands, until restore is called. It is a context manager.

    Attributes:
        policy: what chooses each operand's quantizer: Roles, or a rule such as Fast.
        layers: the forward of each layer, in the model's order.
        counter: the work of the training so far.
        step, steps, replica: see begin_step.
    """

    policy: Policy
    layers: list[LinearProduct] = field(default_factory=list)
    counter: PassCounter = field(default_factory=PassCounter)
    step: int = 0
    steps: int | None = None
    replica: int = 0

    @property
    def is_straight(self) -> bool:
        """Whether backward products take the operands of the forward product."""
        return all(roles.gradients is None for roles in self.policy.possible)

    def begin_step(self, step: int, steps: int, replica: int = 0) -> None:
        """Say which step begins. Random numbers then depend on it alone, so that a resumed training repeats them.

        Args:
            step: the step, 0 .. steps - 1.
            steps: the number of steps of the training.
            replica: the number of the replica, or of the micro-batch that stands for it.

        Raises:
            ValueError: the step is none of them.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step={step} is not in 0..{steps - 1}")
        self.step, self.steps, self.replica = step, steps, replica
        for layer in self.layers:
            layer.uses.clear()

    def restore(self) -> None:
        """Give every layer its own forward again. A second call does nothing."""
        for layer in self.layers:
            if vars(layer.module).get("forward") is layer:
                del layer.module.forward

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def quantize_products(
    model: nn.Module, policy: Policy, *, include: str = IN_DECODER_LAYERS, exclude: str | None = None
) -> QuantizedProducts:
    """Let linear layers compute with quantized operands, forward and backward.

    Gradient checkpointing computes the forward products twice, as two uses with other random numbers. A model that has
    it is refused. torch.utils.checkpoint within a model is not seen, and fits only rounding that is not stochastic.

    Args:
        model: any Hugging Face model. Its parameters stay as they are.
        policy: the quantizer of each role (Roles), or a rule that chooses them.
        include: regular expression that is searched in the names of linear layers. The default is those of the decoder
            layers. LoRA matrices and the towers of a multimodal model are never meant.
        exclude: regular expression of names to leave out.

    Raises:
        ValueError: the pattern finds no linear layer, or finds fused experts, which have no product of their own. A
            layer's forward was replaced already. The model has gradient checkpointing. Or a dimension that a product
            sums is smaller than a block. Nothing is changed then.
    """
    if getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing would compute the forward products again with other random numbers: call "
            "model.gradient_checkpointing_disable() first"
        )
    towers = find_towers(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _is_wanted(name, include, exclude) and why_outside(name, towers) in ("", OUTSIDE)
    ]
    if experts := [name for name, module in found if is_experts(module)]:
        raise ValueError(f"{experts[0]} computes its experts' products itself: leave it out by include or exclude")
    linear = [(name, module) for name, module in found if isinstance(module, nn.Linear | Conv1D)]
    if not linear:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave no linear layer of the model")
    products = QuantizedProducts(policy)
    layers = [LinearProduct(module, name, number, products) for number, (name, module) in enumerate(linear)]
    for layer in layers:
        layer.check()
    for layer in layers:
        layer.module.forward = layer
    products.layers = layers
    return products


class LinearProduct:
    """The forward of a linear layer with quantized operands: takes the place of module.forward.

    Attributes:
        module: the linear layer, with its own parameters.
        name: its name in the model.
        number: its number among the quantized layers.
        products: what it shares with the other layers.
        uses: how often it was used in this step, in training (True) and in evaluation alone (False).
    """

    def __init__(self, module: nn.Module, name: str, number: int, products: QuantizedProducts) -> None:
        self.module, self.name, self.number, self.products = module, name, number, products
        self.uses: Counter[bool] = Counter()

    def check(self) -> None:
        """Raise ValueError if the layer cannot compute with one of the possible quantizers."""
        if "forward" in vars(self.module):
            raise ValueError(
                f"{self.name} has another forward in place of its class's (quantized products, or a hook such as those "
                "of accelerate): remove that one first"
            )
        outputs, inputs = as_matrix(cast(Tensor, self.module.weight), self.module).shape
        for roles in self.products.policy.possible:
            if roles.activations or roles.gradients:
                over_inputs = f"the output of {self.name} is summed over {inputs} inputs"
                check_blocks("weights", roles.weights, inputs, over_inputs)
                check_blocks("activations", roles.activations, inputs, over_inputs)
            if roles.gradients:
                over_outputs = f"the inputs' gradient of {self.name} is summed over {outputs} outputs"
                check_blocks("weights", roles.weights, outputs, over_outputs)
                check_blocks("gradients", roles.gradients, outputs, over_outputs)

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x W^T + bias of the quantized operands."""
        weight = as_matrix(cast(Tensor, self.module.weight), self.module)
        rows, trains = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
        if trains and weight.requires_grad:
            self._check_tokens(len(rows))
        use = self._begin_use(trains=trains)
        result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            rows, weight, self.module.bias, self.products, use
        )
        return result.view(*x.shape[:-1], -1)

    def _check_tokens(self, tokens: int) -> None:
        for roles in self.products.policy.possible:
            if roles.gradients:
                over_tokens = f"the weights' gradient of {self.name} is summed over {tokens} tokens"
                check_blocks("activations", roles.activations, tokens, over_tokens)
                check_blocks("gradients", roles.gradients, tokens, over_tokens)

    def _begin_use(self, *, trains: bool) -> Use:
        shared, count = self.products, self.uses[trains]
        self.uses[trains] += 1
        layers = len(shared.layers)
        return Use(self.name, self.number, layers, shared.step, shared.steps, shared.replica, count, trains)


class _Product(torch.autograd.Function):
    """x W^T + bias and its two backward products, see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: QuantizedProducts, use: Use
    ) -> Tensor:
        weights = products.policy.choose("weights", use, weight)
        activations = products.policy.choose("activations", use, x)
        rounded = use.round(x, activations, "output", "activations")
        rounded_weight = use.round(weight, weights, "output", "weights")
        if use.trains:
            products.counter.add(x.numel() * len(weight), activations, weights)
            ctx.save_for_backward(*((rounded, rounded_weight) if products.is_straight else (x, weight)))
            ctx.products, ctx.use, ctx.weights, ctx.activations = products, use, weights, activations
        return F.linear(rounded, rounded_weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        products, use = ctx.products, ctx.use
        x, weight = ctx.saved_tensors
        spec = products.policy.choose("gradients", use, gradient)
        macs = gradient.numel() * x.shape[1]
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_x = of_weight = None
        if needs_x:
            products.counter.add(macs, spec, ctx.weights)
            if spec is not None:
                weight = use.round(weight.t(), ctx.weights, "inputs", "weights").t()
            of_x = use.round(gradient, spec, "inputs", "gradients") @ weight.to(gradient.dtype)
        if needs_weight:
            products.counter.add(macs, spec, ctx.activations)
            if spec is not None:
                x = use.round(x.t(), ctx.activations, "weights", "activations").t()
            of_weight = use.round(gradient.t(), spec, "weights", "gradients") @ x.to(gradient.dtype)
        of_bias = gradient.sum(0) if needs_bias else None
        return of_x, of_weight, of_bias, None, None


def _is_wanted(name: str, include: str, exclude: str | None) -> bool:
    return re.search(include, name) is not None and (exclude is None or re.search(exclude, name) is None)
