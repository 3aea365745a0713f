"""`kbit bench`: models at several precisions side by side, timed in one process."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kbit.checks import KbitError, check_choice

if TYPE_CHECKING:
    import pandas as pd

    from kbit.costs.bench import Variant
    from kbit.experiments.config import RunConfig

_DESCRIPTION: Final = """\
Measure time per token and memory of a model at several precisions, side by side: all are loaded and take turns, so that
other work on the machine meets them alike. Quantized models are packed, as by `kbit pack`. The keys are model.*,
quant.*, device and eval.speed.* of `kbit run -m --help`, and these:

  bench.against=bf16,fp16,fp32   plain models in these dtypes, and bitsandbytes (NF4 layers), or none
  eval.speed.batches=[1,8,32]    sequences at once
  eval.speed.prompt=128          tokens of each prompt
  eval.speed.new=32              steps, each with one token for each sequence
  eval.speed.repetitions=7       how often each is measured, in turns. Fewer than 6 give no interval
  out=bench                      the folder for the table (CSV, Markdown) and the figure

Times are medians. In brackets stands how many times as fast a variant is as the fastest plain one (16 or 32 bits), by
the median of the rounds' ratios, and `not told apart` where the 95% interval of that holds 1. All variants are in
memory at once: `oom beside 3 others` may fit alone.
A packed model computes in model.dtype, which stands beside its name: model.dtype=bfloat16 compares it with bf16 by the
same arithmetic. `weights` are bytes in memory, `counted` are the bits that figures count (16 for a plain weight), and
`path` is how many layers take which kernel.
`reads` is the share of the speed at which this machine reads memory that the first batch's weights take. It is above
100% where the weights stay in the cache. Prompts are of the fastest batch, and peaks of the one that takes most.
"""
_EPILOG: Final = """\
examples:
  kbit bench model.name=nano-neox-1m,nano-neox-3m quant=nf4,nf3 bench.against=bf16,fp32
  kbit bench model.name=nano-neox-3m quant.bits=3,4,5,6,8 model.dtype=bfloat16 eval.speed.batches=[1,4]
  kbit bench model.name=/models/llama quant=nf4 bench.against=bf16,bitsandbytes
"""
_USUAL: Final = "bf16,fp16,fp32"
_GROUPS: Final = ("model", "quant", "device", "eval.speed")  # what the keys may be of


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit bench`."""
    parser = commands.add_parser(
        "bench",
        usage="kbit bench [model.KEY=...] [quant.KEY=...] [eval.speed.KEY=...] [bench.against=A,B] [out=FOLDER]",
        help="time models at several precisions side by side, with their memory",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_bench, takes_rest=True)


def run_bench(options: argparse.Namespace) -> None:
    """Measure, print the tables, and write them and the figure.

    Raises:
        KbitError, ValueError, OSError: an argument is wrong, or a model cannot be had.
    """
    keys, own = _split_own(options.rest)
    rivals = [] if own["bench.against"] == "none" else [name.strip() for name in own["bench.against"].split(",")]
    configs = _compose(keys)
    variants = _list_variants(configs, rivals)
    from kbit.costs.bench import bench_model
    from kbit.costs.bench_tables import tabulate_bench, write_costs, write_times
    from kbit.evaluation.speed.timing import make_clock
    from kbit.silence import silence_libraries

    silence_libraries()
    benched = []
    for name, of_model in variants.items():
        print(f"{name}: {', '.join(variant.precision for variant in of_model)}", flush=True)
        benched += list(bench_model(of_model, configs[0].eval.speed, make_clock))
    table = tabulate_bench(benched)
    conditions = sorted(set(table["conditions"].dropna())) if "conditions" in table else []
    if not conditions:
        raise KbitError("no variant fits into memory")
    times, costs = write_times(table), write_costs(table)
    print(
        f"\nms per token ({', '.join(conditions)}):\n{times.to_string(index=False)}\n\n{costs.to_string(index=False)}"
    )
    print(f"\n{_describe_machine(table)}")
    _write_files(table, times.merge(costs, how="left").fillna("-"), Path(own["out"]))


def _split_own(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the keys of run, and the values of bench's own.

    Raises:
        ValueError: a key of bench's is unknown, or one of run's would change nothing here.
    """
    own, keys = {"bench.against": _USUAL, "out": "bench"}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.startswith("bench."):
            check_choice("the key", key, ("bench.against",))
        if key in own and not value:
            raise ValueError(f"{key}= needs a value")
        if key in own:
            own[key] = value
        else:
            _check_key(key)
            keys.append(argument)
    return keys, own


def _check_key(key: str) -> None:
    """Raise ValueError if a key of run is not about what is measured here. Flags are Hydra's."""
    name = re.split("[@/]", key.lstrip("+~"))[0]
    is_known = any(name == group or name.startswith(f"{group}.") for group in _GROUPS)
    if not key.startswith("-") and (not is_known or name == "eval.speed.measure"):
        raise ValueError(
            f"kbit bench takes no key {key}: it measures time and memory of packed and plain models, and its keys are "
            f"those of {', '.join(_GROUPS)}, bench.against and out"
        )


def _compose(keys: Sequence[str]) -> list[RunConfig]:
    """Return the configurations that the keys ask for, which differ in models and quantizers alone."""
    from kbit.cli.hydra.app import as_multirun, compose_requests
    from kbit.engine.plan import check_experiment
    from kbit.models.loading import check_device

    fixed = ["eval.tasks=[]", "eval.perplexity=null", "eval.speed.measure=true", "hydra/launcher=basic"]
    requests = compose_requests([*fixed, *as_multirun(keys)], "bench")
    configs = [config for request in requests for config in request.configs]
    if not configs:
        raise KbitError("kbit bench --help says which keys there are")
    if len({(config.eval, config.device) for config in configs}) > 1:
        raise ValueError("eval.speed and device are the same for all that is measured side by side: give one value")
    for config in configs:
        check_experiment(config.experiment)
        if not config.quant.is_baseline and config.quant.scheme is None:
            config.quant.check_packable()
    check_device(configs[0].device)
    return configs


def _list_variants(configs: Sequence[RunConfig], rivals: Sequence[str]) -> dict[str, list[Variant]]:
    """Return the variants of each model: those that the keys ask for, and its rivals.

    Raises:
        ValueError: a rival is unknown or not here.
    """
    from kbit.costs.bench import RIVALS, check_rival, make_rival, make_variant
    from kbit.store.rows import name_model

    for name in rivals:
        check_choice("bench.against", name, RIVALS)
        check_rival(name)
    device, variants = configs[0].device, dict[str, list["Variant"]]()
    for model, quant in dict.fromkeys((config.model, config.quant) for config in configs):
        variants.setdefault(name_model(model), []).append(make_variant(model, quant, device))
    for model in {name_model(config.model): config.model for config in configs}.values():
        variants[name_model(model)] += [make_rival(model, name, device) for name in rivals]
    for of_model in variants.values():
        names = [variant.precision for variant in of_model]
        if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(f"two variants would be called {repeated[0]!r}: leave one of them out")
    return variants


def _describe_machine(table: pd.DataFrame) -> str:
    flops, bytes_ = table["gigaflops"].mean(), table["gigabytes_per_second"].mean()
    return (
        f"this machine, now: {bytes_:.1f} GB/s read, {flops:.0f} GFLOP/s in a product of float32. Wide intervals in "
        "bench.csv mean that other work disturbed it: run it again on a quiet machine"
    )


def _write_files(table: pd.DataFrame, shown: pd.DataFrame, out: Path) -> None:
    """Write the figure, the whole table as CSV, and the one for reading as Markdown and LaTeX."""
    from kbit.analysis.figures.costs.times import draw_bench
    from kbit.analysis.figures.saving import write_figure

    saved = write_figure(draw_bench(table, shown), out)
    print(f"{out.absolute()}: {', '.join(path.name for path in saved.paths)}")
