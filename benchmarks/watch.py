"""Watches a sweep from outside, and how busy the machine is meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Final

from kbit.store.store import Store

POLL: Final = 0.03  # s


class Watch:
    """Looks every 30 ms which of a sweep's experiments have begun (their log is there) and ended (their result is).

    Attributes:
        begins: seconds from the start of the watch to the begin of each experiment, by key.
        ends: seconds from the start of the watch to the end of each experiment, by key.
        nodes: parent of the process that has the log open, which is its node's raylet, by key. Empty unless asked for.
    """

    def __init__(self, results: Path, *, find_nodes: bool = False) -> None:
        log = Store(results).log_path("any")
        assert log is not None  # the store is on this disk
        self.begins: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.nodes: dict[str, int] = {}
        self._folders = ((log.parent, log.suffix, self.begins), (results / "experiments", ".json", self.ends))
        self._find_nodes = find_nodes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            self._look()

    def _look(self) -> None:
        now = time.perf_counter() - self._start
        for folder, suffix, seen in self._folders:
            for file in folder.glob(f"*{suffix}"):
                seen.setdefault(file.stem, now)
        for key in (self.begins.keys() - self.nodes.keys()) if self._find_nodes else ():
            self._find_node(key)

    def _find_node(self, key: str) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (process / "fd" / "1").readlink().stem == key:
                    status = (process / "status").read_text()
                    self.nodes[key] = int(re.findall(r"^PPid:\s+(\d+)", status, re.MULTILINE)[0])


class Load:
    """The machine's load average.

    Attributes:
        before: the load average before the block.
        largest: the largest of those read each second within the block.
    """

    def __init__(self) -> None:
        self.before = os.getloadavg()[0]
        self.largest = self.before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1):
            self.largest = max(self.largest, os.getloadavg()[0])
