"""`kbit doctor`: what works here, from the machine to the data of every configured task and text. No model runs."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from kbit.checks import KbitError

if TYPE_CHECKING:
    from kbit.cli.hydra.compose import Request
    from kbit.experiments.config import RunConfig
    from kbit.models.config import ModelConfig

T = TypeVar("T")

_DESCRIPTION: Final = """\
Say what works here: versions, device, Ray, hub, and whether every model, task and text that the same arguments of
`kbit run` ask for can be had. Nothing is run. Tasks and texts are loaded, from the hub where they are not local.
Exit code 1 if something asked for is missing.
"""

_EXAMPLES: Final = """\
examples:
  kbit doctor                                    the default experiment
  kbit doctor eval=paper device=cuda
  kbit doctor model.name=opt-125m,pythia-70m-v0
  kbit doctor +sweeps=nano/quick                 all models, tasks and texts of a study
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: the thing that was looked at, such as "task piqa".
        detail: a description of what is there or what is missing.
        missing: whether the configuration asks for it and it cannot be had.
    """

    subject: str
    detail: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{'MISSING' if self.missing else 'ok':8}{self.subject:24}{self.detail}"


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit doctor`."""
    parser = commands.add_parser(
        "doctor",
        usage="kbit doctor [arguments of run]",
        help="say what works here, and whether all that the same arguments ask for can be had",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(takes_keys=True, multirun=True, last=["hydra.launcher.examine_only=true"])


def examine(request: Request) -> None:
    """Print what is found, line by line.

    Raises:
        KbitError: something asked for is missing.
    """
    missing = 0
    for finding in diagnose(request.configs):
        print(finding, flush=True)
        missing += finding.missing
    if missing:
        raise KbitError(f"{missing} of what these arguments ask for cannot be had here")


def diagnose(configs: Sequence[RunConfig]) -> Iterator[Finding]:
    """Look at everything that runs of these configurations need, and at every local task.

    Each finding is yielded at once. What several configurations share is looked at once.
    """
    from importlib.metadata import version

    from kbit.version import find_version

    others = [f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval")]
    yield Finding("versions", ", ".join([f"kbit {find_version()}", *others]))
    yield from (_find_devices(device) for device in _distinct(c.device for c in configs))
    yield from (_try("ray", _describe_ray, address) for address in _distinct(c.ray.address for c in configs))
    yield _find_hub()
    yield from (_try("results", _describe_results, folder) for folder in _distinct(c.results for c in configs))
    yield from (_try(f"model {model.name}", _describe_model, model) for model in _distinct(c.model for c in configs))
    asked = _distinct((name, c.eval.task_path) for c in configs for name in c.eval.tasks)
    yield from (_try(f"task {name}", _describe_task, name, folder) for name, folder in asked)
    texts = _distinct(text for c in configs for text in c.texts)
    yield from (_try(f"text {name}", _describe_text, name) for name in texts)
    folders = _distinct(c.eval.task_path for c in configs)
    there = _distinct((name, folder) for folder in folders for name in sorted(_local_tasks(folder)))
    for name, folder in there:
        if (name, folder) not in asked:  # nothing asked for is missing if it does not load
            finding = _try(f"task {name}", _describe_task, name, folder)
            yield Finding(finding.subject, f"{finding.detail} (not configured)")


def _distinct(values: Iterable[T]) -> list[T]:
    """Return each value once, in order."""
    return list(dict.fromkeys(values))


def _find_devices(asked: str) -> Finding:
    import torch  # takes a second, and the lines before need not wait

    from kbit.engine.machine import count_cpus

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    number = int(asked.partition(":")[2] or 0)
    detail = f"{count_cpus()} CPUs, torch uses {torch.get_num_threads()}; {', '.join(cards) or 'no CUDA device'}"
    return Finding(f"device {asked}", detail, missing=asked.startswith("cuda") and number >= len(cards))


def _find_hub() -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    state = "offline (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "used for what is not local"
    there = sorted(path.name.replace("--", "/", 2) for path in cache.glob("*--*")) if cache.is_dir() else []
    return Finding("hub", f"{state}; cache {cache} has {', '.join(there) or 'nothing'}")


def _local_tasks(task_path: str | None) -> dict[str, Path]:
    """Return the local tasks. If the folder is not there, which the configured tasks' lines say, the shipped ones."""
    from kbit.data.task_files import find_local_tasks

    return find_local_tasks(task_path if task_path and Path(task_path).is_dir() else None)


def _try(subject: str, describe: Callable[..., str], *arguments: str | ModelConfig | None) -> Finding:
    try:
        return Finding(subject, describe(*arguments))
    except (ImportError, OSError, ValueError) as error:  # what is raised for what is not there or not right
        return Finding(subject, str(error), missing=True)


def _describe_ray(address: str) -> str:
    from importlib.metadata import version

    if ":" in address and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    place = {"local": "starts on this machine", "auto": "joins the cluster of this machine"}.get(address, address)
    return f"ray {version('ray')}, {place}"


def _describe_results(folder: str) -> str:
    from kbit.store.filesystem import check_writable, open_files
    from kbit.store.readers import list_keys

    check_writable(folder)
    return f"{len(list_keys(folder)[0])} experiments in {open_files(folder).root}"


def _describe_model(model: ModelConfig) -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    from kbit.experiments.requirements import check_model_files
    from kbit.models.catalog import locate_model

    check_model_files(model)
    place = locate_model(model.name)
    if Path(place).is_dir():
        return f"in {place}"
    cached = isinstance(try_to_load_from_cache(place, "config.json"), str)
    if constants.HF_HUB_OFFLINE and not cached:
        raise FileNotFoundError(f"{place} is not in the hub's cache, and HF_HUB_OFFLINE=1 is set")
    return f"{place} of the hub, {'in the cache' if cached else 'to be downloaded'}"


def _describe_task(name: str, task_path: str | None) -> str:
    from kbit.data.tasks import load_tasks
    from kbit.silence import silence_libraries

    silence_libraries()
    loaded, *others = load_tasks([name], task_path)
    if loaded.groups:
        return f"{1 + len(others)} tasks: {', '.join(task.name for task in (loaded, *others))}"
    identity = f"sha256 {loaded.sha256[:12]}" if loaded.sha256 else f"fingerprint {loaded.fingerprint}"
    return f"{len(loaded.task.eval_docs):,} rows of {loaded.source}, {identity}, version {loaded.version}"


def _describe_text(name: str) -> str:
    from kbit.data.texts import read_documents

    documents, sha256 = read_documents(name)
    return f"{len(documents):,} documents, {sum(map(len, documents)):,} characters, sha256 {sha256[:12]}"
