"""`kbit recommend`: which measured model to take for an amount of memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from kbit.cli.listing import note_stopped

_SHOWN: Final = 10
_SIZES: Final = ("gigabytes", "weights", "cache", "activations")
_COLUMNS: Final = ["model", "variant", *_SIZES, "value", "low", "high", "difference", "chance"]
_DESCRIPTION = """\
Say which of the measured models and quantizers is best in an amount of memory: weights with their scales and
embeddings as they were counted, the KV cache, and the activations by formula. An amount of memory is taken to be free,
and a named card loses 1 GB to its driver. (What is not packed takes more: kbit's own int8 methods keep 16-bit weights
beside their codes, and weights by quant.rules stay plain numbers.) Rivals are compared on the same items where the
store has them.
"""
_EPILOG = """\
examples:
  kbit recommend --memory 6GB
  kbit recommend --memory rtx3090 --context 4096 --batch 8 --where "method == 'rtn'"
  kbit recommend --memory 2MB --context 256 --measure cross_entropy --results results
"""


def add_recommend(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit recommend`."""
    parser = commands.add_parser(
        "recommend",
        help="say which measured model is best in an amount of memory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", required=True, help="6GB, 800MB, 2x24GB, or cards: rtx3090, 4xt4")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: 1)")
    parser.add_argument("--measure", help="mean_zero_shot or cross_entropy (default: the first that was measured)")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--where", help="of these experiments only: a condition, such as \"data_type == 'nf'\"")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the 200 best that fit, and what more memory allows"
    )
    parser.set_defaults(run=recommend_model)


def recommend_model(options: argparse.Namespace) -> None:
    """Print what to take, its rivals, and what more or less memory would change.

    Raises:
        KbitError, ValueError, OSError: nothing fits or was measured, there is no store, or an argument is wrong.
    """
    from kbit.analysis.statistics.recommendation import describe_recommendation, format_size, recommend
    from kbit.store.conditions import select_rows
    from kbit.store.readers import read_results

    results = read_results(options.results)
    note_stopped(options.results)
    if options.where:
        results = select_rows(results, options.where)
        if results.empty:
            raise ValueError(f"--where {options.where!r} finds none of the rows of {options.results}")
    asked = {"context": options.context, "batch": options.batch, "measure": options.measure}
    table = recommend(results, options.memory, **asked)
    print("\n".join(describe_recommendation(table)))
    shown = table[table["fits"]].head(_SHOWN)[_COLUMNS]
    sizes = {name: shown[name].map(format_size) for name in _SIZES}
    shown = shown.assign(**sizes).rename(columns={"gigabytes": "memory"})
    print()
    print(shown.to_string(index=False, na_rep="unknown", float_format=lambda value: f"{value:.3g}"))
    if options.csv:
        table.to_csv(options.csv, index=False)
        print(f"{len(table)} rows written to {options.csv}")
