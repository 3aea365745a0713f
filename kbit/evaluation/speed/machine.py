"""What a machine is called in a record."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch


def describe_processor(device: torch.device | str) -> str:
    """Return the name of the card, or of the CPU as Linux tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def identify_host() -> str:
    """Return a word that is the same for all processes of a computer until it is started again, and hides its name."""
    started = Path("/proc/sys/kernel/random/boot_id")
    name = platform.node() + (started.read_text() if started.is_file() else "")
    return hashlib.sha256(name.encode()).hexdigest()[:6]
