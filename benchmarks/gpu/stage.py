"""Run stages of the GPU day in this process: python stage.py FOLDER STAGE ... [--ready]. See day.py."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import torch
from card import Card, Report


def main() -> int:
    """Run the stages, one after the other. Exit code 1: one of them raised, or found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--ready", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    if options.ready:
        importlib.import_module("simulator").prepare_simulator()
    went_well = [run(name, options.folder, options.ready) for name in options.stages]
    return int(not all(went_well))


def run(name: str, folder: Path, is_ready_check: bool) -> bool:
    """Run one stage, and return whether it ended well."""
    card = Card(torch.device("cpu") if is_ready_check else torch.device("cuda", 0))
    stage = importlib.import_module(name)
    report = Report(folder, name, card, stage.summarize)
    try:
        stage.run(card, report, stage.READY if is_ready_check else stage.FULL)
    except Exception as error:
        traceback.print_exc()
        return report.finish("; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
