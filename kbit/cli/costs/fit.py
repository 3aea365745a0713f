"""`kbit fit`: how much memory models take at each precision, and which is the largest that fits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_DESCRIPTION = """\
Show the memory of models at several precisions, by formula, and the largest model that fits on each hardware. A number
of bits is nf in blocks of 64, and the names of conf/quant (nf4_dq, int8_rowwise, ...) are understood, too. Everything
outside of the block matrices has 16 bits. A GB is 10^9 bytes, for cards too, which have up to 7% more.
"""
_EPILOG = """\
examples:
  kbit fit --hardware rtx3090x1,t4x1,24GB --bits 16,8,4,3
  kbit fit --models pythia-12b,opt-13b --bits 16,nf4_dq --context 1024 --batch 8
  kbit fit --hardware 8x24GB --bits 16,int8_rowwise --context 0 --overhead 0      (weights alone)
  kbit fit --hardware a100-80gb --train lora --rank 16 --bits 16,nf4_dq
"""


def add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit fit`."""
    parser = commands.add_parser(
        "fit",
        help="show how much memory models take at each precision, and which fit where",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", metavar="A,B", help="short names or folders, whose memory is shown (default: all published models)"
    )
    parser.add_argument(
        "--hardware", default="24GB,80GB,8x80GB", help="cards or amounts of memory (default: 24GB,80GB,8x80GB)"
    )
    parser.add_argument("--bits", default="16,8,4,3", help="numbers of bits or named quantizers (default: 16,8,4,3)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: 1)")
    parser.add_argument(
        "--train", default="none", help="none (inference), lora, or adam or adam8 with --bits 16 (default: none)"
    )
    parser.add_argument("--rank", type=int, default=64, help="rank of lora's adapters (default: 64)")
    parser.add_argument(
        "--overhead",
        type=float,
        default=1.0,
        help="GB that each card loses to its driver and libraries (default: 1, which is assumed, not measured)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table of all models as CSV")
    parser.set_defaults(run=fit_models)


def fit_models(options: argparse.Namespace) -> None:
    """Print the largest model for each hardware and precision, and the memory of the models that were named.

    Raises:
        ValueError: an argument is wrong. The message names it.
    """
    from kbit.costs.fit import parse_precisions, tabulate_largest, tabulate_memory
    from kbit.costs.hardware import GB, parse_hardware
    from kbit.costs.memory import Use
    from kbit.costs.shapes import find_shape, read_catalogue

    if not options.overhead >= 0:
        raise ValueError(f"--overhead {options.overhead:g} is less than 0")
    use = Use(options.context, options.batch, options.train, options.rank)
    hardware = [parse_hardware(name) for name in options.hardware.split(",")]
    precisions = parse_precisions(options.bits)
    named = [name.strip() for name in options.models.split(",")] if options.models else list(read_catalogue())
    shapes = [find_shape(name) for name in named]
    arguments = (precisions, hardware, use, options.overhead * GB)
    _print_table("largest model that fits", tabulate_largest(shapes, *arguments))
    table = tabulate_memory(shapes, *arguments)
    if options.models:
        print()
        _print_table(f"GB at a context of {use.context} tokens, batch {use.batch}, training: {use.train}", table)
    if options.csv:
        table.to_csv(options.csv, index=False)
        print(f"{len(table)} rows written to {options.csv}")


def _print_table(title: str, table: pd.DataFrame) -> None:
    print(f"{title}:")
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"))
