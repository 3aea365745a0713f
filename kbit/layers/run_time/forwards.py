"""Forwards in place of modules' own: what models do at run time besides what their weights say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Forward(ABC):
    """What takes the place of a module's forward, until undo_forwards.

    Attributes:
        before: the forward that the module has without it, bound to the module.
        replaced: a forward that was in place of the class's already, such as accelerate's, or None.
    """

    before: Callable[..., Any]
    replaced: Callable[..., Any] | None = None

    @property
    @abstractmethod
    def sees_whole_input(self) -> bool:
        """Whether a token's output depends on later tokens, or on what else is in the batch."""

    def install(self, module: nn.Module) -> None:
        """Take the place of a module's forward."""
        self.before, self.replaced = module.forward, vars(module).get("forward")
        module.forward = self  # type: ignore[assignment]


def list_forwards(model: nn.Module) -> list[tuple[str, Forward]]:
    """Return the forwards that stand in place of modules' own, with the modules' names."""
    found = ((name, vars(module).get("forward")) for name, module in model.named_modules())
    return [(name, forward) for name, forward in found if isinstance(forward, Forward)]


def sees_whole_input(model: nn.Module) -> bool:
    """Whether some module's output depends on what else is in the batch: texts must be given one at a time."""
    return any(forward.sees_whole_input for _, forward in list_forwards(model))


def undo_forwards(model: nn.Module) -> None:
    """Give every module its own forward again."""
    for name, forward in list_forwards(model):
        module = model.get_submodule(name)
        if forward.replaced is None:
            del module.forward
        else:
            module.forward = forward.replaced
