"""What transformers, accelerate and numba import at their start and a run never uses is left out here.

A worker spends more CPU time on imports than on a small model. About 40% of it goes to parts of other packages that no
experiment calls: torch's distributed tensors and checkpoints with sympy behind them, torch's compiler, scipy's
optimizers for losses of object detection, coverage, and Amazon's client. The libraries have no switch for it. So this
file answers their questions whether such a package is there with no, and reads each of transformers' model files once
instead of twice. What an experiment computes does not change: none of the parts takes part in it.

transformers keeps these answers for the rest of the process, so that only processes of the command line ask for
import_lean. What loaded_lean leaves out of one load holds for any process.
Where another version of a library has no such question, its import takes as long as it would without this file.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# What must not be in a process that only runs experiments. A test looks for them.
UNUSED: Final = (
    *("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"),
    *("torch._inductor", "sympy", "scipy.optimize", "boto3", "botocore", "sklearn", "matplotlib", "IPython"),
)
_DYNAMO: Final = "torch._dynamo"
_SCANNED: Final = "transformers.utils.import_utils"  # has a function that looks through the files of all models:
_SCAN: Final = "create_import_structure_from_path"


def import_lean() -> None:
    """Import transformers' models and numba without what a run never uses. Nothing happens if they are imported."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with collected_later(), _read_once(), hidden("boto3"), hidden("coverage"):
        import torch
        import transformers.utils as utils

        importlib.import_module("numba")
        # Each function remembers its answer. That of distributed tensors must stay: it is asked before each of them is.
        with replaced(torch.distributed, is_available=lambda: False):
            getattr(utils, "is_torch_distributed_available", bool)()
        with _scipy_denied(utils), _compiler_replaced():
            for name in ("modeling_utils", "generation.utils"):  # which every model imports
                importlib.import_module(f"transformers.{name}")
        gc.freeze()  # these modules stay, so that no later collection needs to look at them


@contextmanager
def loaded_lean() -> Iterator[None]:
    """Let transformers make a model on the meta device without torch's compiler and sympy, 2 to 3 s of CPU.

    On that device torch fills embeddings and counts positions by Python functions, which import them at their first
    call. An embedding has nothing to fill there. Models with rotary positions still import sympy, but no compiler.
    """
    from torch.nn import init

    fill = init.normal_

    def fill_real(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return tensor if tensor.is_meta else fill(tensor, *arguments, **options)

    with replaced(init, normal_=fill_real), _compiler_replaced():
        yield


@contextmanager
def _scipy_denied(utils: Any) -> Iterator[None]:
    """Let transformers believe that there is no scipy, whose optimizers its losses of object detection use."""
    ask: Any = getattr(utils, "is_scipy_available", None)
    if not hasattr(ask, "cache_clear"):
        yield
        return
    ask.cache_clear()
    with hidden_from_search("scipy"):
        ask()
    yield
    ask.cache_clear()


@contextmanager
def _compiler_replaced() -> Iterator[None]:
    """Let modules import torch's compiler, which nothing here calls, without all that belongs to it."""
    if _DYNAMO in sys.modules:
        yield
        return
    import torch

    sys.modules[_DYNAMO] = package = _Dynamo(_DYNAMO)
    package.__path__ = [str(Path(torch.__path__[0]) / "_dynamo")]  # its own modules are the real ones
    try:
        yield
    finally:
        for place, name in ((sys.modules, _DYNAMO), (vars(torch), "_dynamo")):
            if place.get(name) is package:
                del place[name]


def _leave(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function by leaving it as it is."""
    return function


def _leave_any(function: Callable[..., Any] | None = None, *_: Any, **options: Any) -> Callable[..., Any]:
    """Leave a function as it is, or return a decorator that does, as torch.compiler.disable is used in both ways."""
    return _leave if function is None else function


class _Dynamo(ModuleType):
    """Stands for torch._dynamo, which is asked for decorators and for one small module."""

    allow_in_graph = assume_constant_result = staticmethod(_leave)
    disable = staticmethod(_leave_any)

    def __getattr__(self, name: str) -> Any:
        """Return any other part of the real package, which takes this one's place."""
        if name.startswith("__"):
            raise AttributeError(name)
        del sys.modules[_DYNAMO]
        return getattr(importlib.import_module(_DYNAMO), name)


@contextmanager
def collected_later() -> Iterator[None]:
    """Let no garbage be collected in the block. Python would look through all new modules again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Let a package that is not imported yet seem not to be installed."""
    with nullcontext() if name in sys.modules else hidden_from_search(name):
        yield


@contextmanager
def hidden_from_search(name: str) -> Iterator[None]:
    """Let a package seem not to be installed, even if it is imported. Modules that have it keep it."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own sign for this
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Let a module or class have other attributes for a while."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers look through the files of its models once, where it does so for two of its packages."""
    finder = _ScanFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _ScanFinder:
    """Finds the module that looks through the files, and lets its function remember what it found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return Python's own description of that one module, with a loader that changes it."""
        spec = PathFinder.find_spec(name, path, target) if name == _SCANNED else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            if scan := vars(module).get(_SCAN):
                remembered: Any = functools.cache(scan)
                vars(module)[_SCAN] = lambda path: remembered(_find_folder(path))

        vars(spec.loader)["exec_module"] = load_and_change
        return spec


def _find_folder(path: str | Path) -> str:
    """Return the folder of a file, or the folder itself."""
    return str(Path(path).parent if Path(path).is_file() else path)
