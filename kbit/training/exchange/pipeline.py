"""A model cut into pipeline stages whose activations and gradients are quantized on their way (Dettmers 2016).

The output of a module, such as a decoder layer, goes to the next stage as bytes, and its gradient comes back as bytes.
Here both stages are in one process. Between processes send_values and receive_values of kbit.training.exchange.hook
move the same bytes, if `where` is "<module>/<role>/<use>" as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from kbit.layers.run_time.transient import with_own_seed
from kbit.models.parameters import find_towers
from kbit.numerics.spec import QuantSpec
from kbit.training.exchange.wire import check_sent, decode, encode


@dataclass
class PipelineCut:
    """A place between two stages, until remove is called. It is a context manager.

    Attributes:
        name: the last module of the first stage.
        activations: the quantizer of what goes on. None sends float32.
        gradients: the quantizer of what comes back. None sends float32.
        sent: bytes that went on and came back.
        uses: how often something went on in training. Random numbers depend on it.
    """

    name: str
    activations: QuantSpec | None
    gradients: QuantSpec | None
    sent: int = 0
    uses: int = 0
    handle: RemovableHandle | None = None

    def transfer(self, values: Tensor, role: str, use: int) -> Tensor:
        """Return the values as the other stage decodes them, in their own dtype."""
        spec: QuantSpec | None = getattr(self, role)
        own = None if spec is None else with_own_seed(spec, f"{self.name}/{role}/{use}")
        data = encode(values, own, f"{role} after {self.name}, use {use}")
        self.sent += len(data)
        return decode(data, tuple(values.shape), spec).to(values)

    def state_dict(self) -> dict[str, int]:
        """Return what a training needs to go on from a checkpoint with the same random numbers."""
        return {"sent": self.sent, "uses": self.uses}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from what state_dict returned."""
        self.sent, self.uses = state["sent"], state["uses"]

    def remove(self) -> None:
        """Let the module's output go on as it is again."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def cut_pipeline(
    model: nn.Module, after: str, activations: QuantSpec | None, gradients: QuantSpec | None
) -> PipelineCut:
    """Quantize what a module hands on to the rest of a model, and the gradient that comes back.

    Args:
        model: the model.
        after: the name of the module, such as gpt_neox.layers.0.
        activations: the quantizer of its output. None, or 16 bits, sends float32.
        gradients: the quantizer of the output's gradient. None, or 16 bits, sends float32.

    Raises:
        ValueError: there is no such module, or a quantizer that its role cannot have.
    """
    modules = dict(model.named_modules())
    if after not in modules:
        raise ValueError(f"after={after!r} is no module of the model, such as {list(modules)[1]}")
    sent_back = check_sent("gradients", gradients, is_gradient=True)
    cut = PipelineCut(after, check_sent("activations", activations), sent_back)

    def hand_on(module: nn.Module, inputs: Any, output: Any) -> Any:
        use = cut.uses
        cut.uses += torch.is_grad_enabled()
        if isinstance(output, tuple):
            return (_Transfer.apply(output[0], cut, use), *output[1:])  # type: ignore[no-untyped-call]
        return _Transfer.apply(output, cut, use)  # type: ignore[no-untyped-call]

    cut.handle = modules[after].register_forward_hook(hand_on)
    return cut


def find_stage_ends(model: Any, stages: int) -> list[str]:
    """Return the last decoder layer of each of a model's stages but the last, of nearly equal numbers of layers.

    Raises:
        ValueError: the model has fewer decoder layers than stages, or they are not found.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if stages > count:
        raise ValueError(f"train.stages={stages} is more than the {count} decoder layers of the model")
    towers = tuple(f"{tower}." for tower in find_towers(model))
    lists = (name for name, own in model.named_modules() if isinstance(own, nn.ModuleList) if len(own) == count)
    name = next((name for name in lists if not name.startswith(towers)), None)
    if name is None:
        raise ValueError(f"train.stages={stages}: {type(model).__name__} has no list of its {count} decoder layers")
    return [f"{name}.{count * stage // stages - 1}" for stage in range(1, stages)]


class _Transfer(torch.autograd.Function):
    """What the next stage decodes of a tensor. Its gradient is what the stage before decodes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cut: PipelineCut, use: int) -> Tensor:
        ctx.cut, ctx.use = cut, use
        return cut.transfer(values, "activations", use)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.cut.transfer(gradient, "gradients", ctx.use), None, None
