"""The log of an experiment: all that its worker printed, libraries and crashes of C code included."""

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
    """Append a line with the time and a title to a file, and below it what is printed within the block.

    Args:
        path: the log file. None keeps no log.
        title: the label of the experiment.
        redirect: whether all that this process prints goes to the file, as nobody sees the output of a worker's
            process. If not, the file gets the first line alone.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {title}\n")
        log.flush()
        with _redirect(log.fileno()) if redirect else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def _redirect(target: int) -> Iterator[None]:
    """Send standard output and error to a file, where a segmentation fault leaves its traceback too."""
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
