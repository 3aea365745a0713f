"""What works here: the machine, the hub, and the data of every configured task and text, without running a model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kbit.config import RunConfig
from kbit.families import locate_model
from kbit.taskfiles import find_local_tasks
from kbit.textdata import read_documents


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at, such as "task piqa".
        detail: what is there, or what is missing.
        missing: the configuration asks for it and it cannot be had.
    """

    subject: str
    detail: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{'MISSING' if self.missing else 'ok':8}{self.subject:24}{self.detail}"


def diagnose(config: RunConfig) -> Iterator[Finding]:
    """Look at everything a run of this configuration needs, and at every local task; yields what is found at once."""
    yield Finding(
        "versions", ", ".join(f"{name} {version(name)}" for name in ("kbit", "torch", "transformers", "lm-eval"))
    )
    yield _find_devices(config.device)
    yield _try("ray", _describe_ray, config.ray.address)
    yield _find_hub()
    yield _try("results", lambda: _describe_results(config.results))
    yield _try(f"model {config.model.name}", lambda: _describe_model(config.model.name))
    asked = config.eval.tasks
    yield from (_try(f"task {name}", _describe_task, name, config.eval.task_path) for name in asked)
    if config.eval.perplexity is not None:
        yield _try(f"text {config.eval.perplexity}", _describe_text, config.eval.perplexity)
    others = [name for name in sorted(_local_tasks(config.eval.task_path)) if name not in asked]
    for name in others:  # not asked for, so nothing is missing if it does not load
        finding = _try(f"task {name}", _describe_task, name, config.eval.task_path)
        yield Finding(finding.subject, f"{finding.detail} (not configured)")


def _find_devices(asked: str) -> Finding:
    import torch  # takes a second, and the lines before need not wait

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    number = int(asked.partition(":")[2] or 0)
    detail = f"{os.cpu_count()} CPUs, torch uses {torch.get_num_threads()}; {', '.join(cards) or 'no CUDA device'}"
    return Finding(f"device {asked}", detail, missing=asked.startswith("cuda") and number >= len(cards))


def _find_hub() -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    state = "offline (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "used for what is not local"
    there = sorted(path.name.replace("--", "/", 2) for path in cache.glob("*--*")) if cache.is_dir() else []
    return Finding("hub", f"{state}; cache {cache} has {', '.join(there) or 'nothing'}")


def _local_tasks(task_path: str | None) -> dict[str, Path]:
    """Return the local tasks; the shipped ones if the folder is not there, which the configured tasks' lines say."""
    return find_local_tasks(task_path if task_path and Path(task_path).is_dir() else None)


def _try(subject: str, describe: Callable[..., str], *arguments: str | None) -> Finding:
    try:
        return Finding(subject, describe(*arguments))
    except (OSError, ValueError) as error:  # what loading raises for what is not there or not right
        return Finding(subject, str(error), missing=True)


def _describe_ray(address: str) -> str:
    if ":" in address and "://" not in address:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    place = {"local": "starts on this machine", "auto": "joins the cluster of this machine"}.get(address, address)
    return f"ray {version('ray')}, {place}"


def _describe_results(folder: str) -> str:
    from kbit.files import check_writable, open_files
    from kbit.store import list_keys

    check_writable(folder)
    return f"{len(list_keys(folder)[0])} experiments in {open_files(folder).root}"


def _describe_model(name: str) -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    place = locate_model(name)
    if Path(place).is_dir():
        return f"in {place}"
    cached = isinstance(try_to_load_from_cache(place, "config.json"), str)
    if constants.HF_HUB_OFFLINE and not cached:
        raise FileNotFoundError(f"{place} is not in the hub's cache, and HF_HUB_OFFLINE=1 is set")
    return f"{place} of the hub, {'in the cache' if cached else 'to be downloaded'}"


def _describe_task(name: str, task_path: str | None) -> str:
    from kbit.quiet import silence_libraries
    from kbit.tasks import load_tasks

    silence_libraries()
    [loaded] = load_tasks([name], task_path)
    identity = f"sha256 {loaded.sha256[:12]}" if loaded.sha256 else f"fingerprint {loaded.fingerprint}"
    return f"{len(loaded.task.eval_docs):,} rows of {loaded.source}, {identity}, version {loaded.version}"


def _describe_text(name: str) -> str:
    documents, sha256 = read_documents(name)
    return f"{len(documents):,} documents, {sum(map(len, documents)):,} characters, sha256 {sha256[:12]}"
