"""How many workers fit on the nodes of a cluster, or on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbit.experiments.config import RayConfig


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
