"""How a command ends that cannot do what was asked."""

from __future__ import annotations

import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Print why nothing can be run, and exit with 1."""
    print(f"kbit: error: {message}", file=sys.stderr)
    sys.exit(1)
