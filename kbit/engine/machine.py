"""What machines give to a sweep: CPUs that a process may use, GPUs, and the workers that fit. Asked without Ray."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kbit.experiments.config import RayConfig

_ROOT = Path("/")
# Seconds of an idle machine of two CPUs until Ray has started, and until a worker has imported what it needs.
_RAY_SECONDS, _WORKER_SECONDS = 6.0, 8.0
_MEMORY_SHARE = 0.9  # share of the free memory to fill by estimate. Ray ends workers where 95% of all memory is taken


def count_cpus(root: Path = _ROOT) -> int:
    """Return the number of CPUs that this process may use: by its affinity, and by the quota of its control group.

    Args:
        root: the folder in which proc and sys lie.
    """
    quotas = [quota for quota in _read_quotas(root) if quota > 0]
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in quotas)]))


def _read_quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that the process' control groups, and those around them, allow (versions 1 and 2)."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            base = root / "sys/fs/cgroup"
            if controllers:
                base = base / controllers if (base / controllers).is_dir() else base / "cpu"
            if not controllers or "cpu" in controllers.split(","):
                place = Path(group.lstrip("/"))
                for folder in (place, *place.parents):  # a container sees its own group at the top
                    yield from _read_quota(base / folder)


def _read_quota(folder: Path) -> Iterator[float]:
    """Yield the quota of one control group in CPUs, if it has one."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        yield int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError):
        period = (folder / "cpu.cfs_period_us").read_text()
        yield int((folder / "cpu.cfs_quota_us").read_text()) / int(period)  # -1 is no quota


def find_free_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes of memory that processes may still take on this machine, or None where Linux does not tell.

    Args:
        root: the folder in which proc lies.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def limit_by_memory(workers: int, worker_bytes: int | None, free_bytes: int | None) -> int:
    """Return how many of these workers have room in memory, and at least one. Unknown sizes limit nothing."""
    if not worker_bytes or free_bytes is None:
        return workers
    return max(1, min(workers, int(_MEMORY_SHARE * free_bytes) // worker_bytes))


def count_gpus() -> int:
    """Return the number of GPUs that torch can use. torch is imported only if there is a driver."""
    if not has_driver(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return 0
    import torch

    return torch.cuda.device_count()


def has_driver(visible: str | None) -> bool:
    """Whether a GPU's driver is installed, and CUDA_VISIBLE_DEVICES does not hide all GPUs."""
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    for library in ("libcuda.so.1", "libamdhip64.so"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False


def predict_start(engine: str, workers: int, *, local: bool = True) -> float:
    """Return the seconds until the first experiment begins, when these workers start beside the machine's other work.

    Args:
        engine: "ray" or "process", see kbit.cli.hydra.compose.Request.
        workers: the number of workers.
        local: whether Ray and the workers start on this machine, and not on a running cluster.
    """
    if engine == "process" or not local:
        return _WORKER_SECONDS
    sharing = (os.getloadavg()[0] + workers) / (os.cpu_count() or 1)
    return (_RAY_SECONDS + _WORKER_SECONDS) * max(1.0, sharing)


def count_workers(config: RayConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many workers to start.

    Args:
        config: the resources that a worker asks for.
        nodes: the resources of each node of the cluster.

    Raises:
        ValueError: fewer workers fit than are asked for, or not even one. The message names what each node has.
    """
    gpus_per_worker = config.gpus_per_worker or 0.0
    fitting = sum(count_fitting(node, config.cpus_per_worker, gpus_per_worker) for node in nodes)
    wanted = config.num_workers or max(fitting, 1)
    if wanted > fitting:
        there = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes]
        total = f"{sum(n.get('CPU', 0) for n in nodes):g} CPUs and {sum(n.get('GPU', 0) for n in nodes):g} GPUs"
        by_node = f", on {len(nodes)} nodes of {'; '.join(there)}" if len(nodes) > 1 else ""
        raise ValueError(
            f"{wanted} workers with ray.cpus_per_worker={config.cpus_per_worker} and ray.gpus_per_worker="
            f"{gpus_per_worker:g} do not fit: the cluster has {total}{by_node}; {fitting} such workers would fit"
        )
    return wanted


def count_fitting(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers fit on a node. A share of a GPU lies on one GPU, and all GPUs of a worker on one node."""
    by_cpus = int(node.get("CPU", 0) // cpus)
    there = int(node.get("GPU", 0))
    if not gpus:
        return by_cpus
    return min(by_cpus, there // math.ceil(gpus) if gpus >= 1 else there * int(1 / gpus + 1e-9))
