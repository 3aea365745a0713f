"""Finds the store that the notebooks read, or makes one.

Set KBIT_RESULTS to a store, or run `make demo` first, which writes results/ at the top of the repository. Without
either, a study of 15 small experiments on embedded models runs in a temporary folder. The study takes seconds, and its
numbers are rough.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.models.config import ModelConfig
from kbit.store.records import open_existing
from kbit.store.store import Store

TOP: Final = Path(__file__).resolve().parents[2]
MODELS: Final = ("nano-neox-98k", "nano-neox-332k", "nano-neox-1m")
PRECISIONS: Final = (3, 4, 5, 6, 16)
EVALUATION: Final = EvalConfig(tasks=(), perplexity_windows=16)


def find_store() -> str:
    """Return the path of the store to read.

    The store is KBIT_RESULTS, else results/ at the top of the repository, else that of a quick study.

    Raises:
        FileNotFoundError: KBIT_RESULTS names no store.
    """
    if wanted := os.environ.get("KBIT_RESULTS"):
        return open_existing(wanted).root
    if (TOP / "results" / "experiments").is_dir():
        return str(TOP / "results")
    return run_quick_study(tempfile.mkdtemp(prefix="kbit-quick-study-"))


def run_quick_study(path: str) -> str:
    """Measure cross entropy on a few windows of held-out text and return the path of the store."""
    store = Store(path)
    for name in MODELS:
        session = Session(ModelConfig(name))
        for bits in PRECISIONS:
            quantizer = QuantConfig(bits=bits, data_type="nf", block_size=64)
            store.write(session.run(Experiment(session.config, quantizer, EVALUATION)))
    return path
