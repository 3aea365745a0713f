"""What reaches into private parts of Ray, so that an upgrade can break this file alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kbit.lean_private import replaced


def silence_raylet() -> None:
    """Keep Ray's own processes from printing here. log_to_driver=False keeps only the workers from it.

    They print several coloured lines for each worker that dies. The sweep tells of it in one line of its own.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False


@contextmanager
def started_bare(bare: bool) -> Iterator[None]:
    """Let ray.init start a cluster without the processes that a sweep on one machine does not use.

    These are the server of the dashboard (which runs without a dashboard, too, and ray.init waits for it), the monitor
    that asks for more machines, and the one that collects the workers' logs, which are not shown. Each of them imports
    Ray, for a second or more of CPU time.

    Args:
        bare: whether to do so. A cluster that is joined has its processes already.
    """
    if not bare:
        yield
        return
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    known = inspect.signature(RayParams.__init__).parameters
    wanted = {"no_monitor": True, "include_log_monitor": False}
    options = {name: value for name, value in wanted.items() if name in known}
    init: Any = functools.partialmethod(RayParams.__init__, **options)
    with replaced(RayParams, __init__=init), replaced(Node, start_api_server=_start_nothing):
        yield


def _start_nothing(node: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
    """Start no server of a dashboard."""
