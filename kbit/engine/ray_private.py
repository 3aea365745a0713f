"""What reaches into private parts of Ray, so that an upgrade can break this file alone."""

from __future__ import annotations


def silence_raylet() -> None:
    """Keep Ray's own processes from printing here. log_to_driver=False keeps only the workers from it.

    They print several coloured lines for each worker that dies. The sweep tells of it in one line of its own.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False
