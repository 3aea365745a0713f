"""The log of an experiment: what its worker printed, libraries and crashes of C code included."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path


@contextlib.contextmanager
def log_output(path: Path | None, title: str, *, redirect: bool) -> Iterator[None]:
    """Append what is printed meanwhile to a file, below a line with the time and the title.

    Args:
        path: of the log; None keeps none.
        title: of the experiment.
        redirect: send all that this process prints there, instead of writing the first line alone: for a worker's
            process, whose output nobody sees.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {title}", file=log, flush=True)
        with _redirect(log.fileno()) if redirect else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _redirect(target: int) -> Iterator[None]:
    """Let standard output and error go to a file; a segmentation fault leaves its traceback there."""
    kept = [os.dup(stream) for stream in (1, 2)]
    faulthandler.enable(file=target)
    for stream in (1, 2):
        os.dup2(target, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        faulthandler.disable()  # its file is about to be closed
