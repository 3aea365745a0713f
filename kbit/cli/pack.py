"""`kbit pack` and `kbit export`: a study's winner as a checkpoint, in kbit's own format or in other tools'."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kbit.checks import KbitError, check_choice

if TYPE_CHECKING:
    from kbit.experiments.config import Experiment
    from kbit.experiments.result import Result

FORMATS: Final = ("bitsandbytes", "gguf", "compressed-tensors", "gptq")  # of kbit.checkpoints.export.FORMATS

_PACK: Final = """\
Quantize a model, and write it as a checkpoint whose layers compute with the packed codes. transformers loads it where
kbit is imported, `kbit run model.name=FOLDER quant.bits=16` evaluates it, and `kbit export` writes it for other tools.
The keys are those of `kbit run --help`. With --from the model and the quantizer are those of a stored result, and it is
checked that the packed weights are those that were measured. Only device= can be given beside --from: the device that
quantizes, which is the CPU otherwise.
"""

_PACK_EXAMPLES: Final = """\
examples:
  kbit pack model.name=nano-neox-1m quant=nf4_dq out=packed
  kbit pack model.name=nano-neox-1m quant.bits=3 quant.method=gptq out=packed
  kbit pack --from results:2f6a0c4b9d1e8f73 out=packed
"""

_EXPORT: Final = """\
Write a packed checkpoint in the format of another tool: codes and scales that stand for the same values. What a format
cannot hold exactly is refused, with the reason and a quantizer that it does hold. The tools of compressed-tensors and
gptq then compute with these values rounded to 16 bits. gguf needs the extra
kbit[gguf] and writes model.gguf into the folder. The other formats are folders that transformers loads beside the tool.
"""

_EXPORT_EXAMPLES: Final = """\
examples:
  kbit export packed --format bitsandbytes --out for_bitsandbytes        of quant=nf4, nf4_dq or fp4_bnb
  kbit export packed --format compressed-tensors --out for_vllm          of quant=int4_grid or int8_grid
  kbit export packed --format gguf --out for_llama_cpp                   of those, or quant=gguf_q4_1, gguf_q5_0, ...
"""


def add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit pack`."""
    parser = commands.add_parser(
        "pack",
        usage="kbit pack [--from RESULTS:KEY] [keys of run] out=FOLDER",
        help="quantize a model and write it as a packed checkpoint",
        description=_PACK,
        epilog=_PACK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from", dest="source", metavar="RESULTS:KEY", help="pack the variant of a stored result")
    parser.set_defaults(run=run_pack, takes_rest=True)


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit export`."""
    parser = commands.add_parser(
        "export",
        help="write a packed checkpoint in the format of another tool",
        description=_EXPORT,
        epilog=_EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="PACKED", help="the folder of a packed checkpoint")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=Path, help="the folder to write; gguf writes model.gguf into it")
    parser.set_defaults(run=run_export)


def run_pack(options: argparse.Namespace) -> None:
    """Pack a model and print what came of it.

    Raises:
        KbitError: the weights are not those that were measured, or the arguments ask for no single experiment.
        ValueError, OSError: a value is wrong, or a file cannot be had.
    """
    keys, out = _split_out(options.rest)
    if options.source is None:
        experiment, device, result = *_compose_one(keys), None
    else:
        device = _take_device(keys)
        result = _read_result(options.source)
        experiment = result.experiment
    print(_pack(experiment, device, out, result))


def _take_device(keys: Sequence[str]) -> str:
    """Return the device that is asked for beside --from, which takes all other keys from the result."""
    from kbit.experiments.config import RunConfig

    others = [key for key in keys if not key.startswith("device=")]
    if others:
        raise KbitError(f"kbit pack --from takes its keys from the result, and not {others[0]}")
    return RunConfig(device=keys[-1].partition("=")[2]).device if keys else "cpu"


def _split_out(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """Return the arguments without out=FOLDER, and the folder."""
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("out=")]
    if len(given) != 1 or not given[0]:
        raise KbitError("kbit pack needs out=FOLDER, the folder to write")
    out = Path(given[0])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KbitError(f"out={out} exists already: name a new folder")
    return [argument for argument in arguments if not argument.startswith("out=")], out


def _compose_one(keys: Sequence[str]) -> tuple[Experiment, str]:
    from kbit.cli.hydra.app import compose_requests

    requests = compose_requests([*keys, "hydra/launcher=basic"], "pack")
    configs = [config for request in requests for config in request.configs]
    if len(configs) != 1:
        raise KbitError(f"kbit pack packs one model, and these keys ask for {len(configs)} experiments")
    return configs[0].experiment, configs[0].device


def _read_result(source: str) -> Result:
    """Return the stored result that RESULTS:KEY names."""
    from kbit.experiments.result import Result
    from kbit.store.records import read_as

    store, _, key = source.rpartition(":")
    if not store:
        raise KbitError(f"--from {source} is no RESULTS:KEY, such as results:2f6a0c4b9d1e8f73")
    found = list(read_as(Result, store, keys=[key]))
    if not found:
        raise KbitError(f"{store} has no result with the key {key}: `kbit results --results {store}` lists them")
    return found[0]


def _pack(experiment: Experiment, device: str, out: Path, result: Result | None) -> str:
    """Pack the model of an experiment into a folder, and return what there is to say."""
    from kbit.checkpoints.loading import load_model, pack_loaded
    from kbit.checkpoints.packing import count_stored_bytes
    from kbit.checkpoints.saving import describe_bytes, save_packed
    from kbit.experiments.requirements import check_model_files, check_not_packed

    check_model_files(experiment.model)
    check_not_packed([experiment])
    options: dict[str, Any] = {"dtype": experiment.model.dtype, "device": device, **experiment.model.parts}
    loaded = load_model(experiment.model.name, **options)
    report, weights_hash = pack_loaded(loaded, experiment.quant)
    if result is not None and weights_hash != result.weights_hash:
        raise KbitError(
            f"the weights of {experiment.label()} have the hash {weights_hash} here, and those that were measured "
            f"{result.weights_hash}: the model's files, kbit ({result.versions.get('kbit', '?')} then) or the machine "
            "differ. Nothing was written"
        )
    measured = "" if result is None else _tabulate(result)
    save_packed(loaded.model, loaded.tokenizer, out, made_of=experiment.model.name, measured=measured)
    checked = "" if result is None else f"\nits weights are those that {result.key} measured ({weights_hash})"
    sizes = describe_bytes(report.total_bits, count_stored_bytes(loaded.model), out)
    return f"{out}: {experiment.label()}, {report.bits_per_param:.4g} bits per packed parameter, {sizes}{checked}"


def _tabulate(result: Result) -> str:
    """Return a result's numbers as a table in Markdown."""
    rows = [
        f"| {m.task} | {m.metric} | {m.value:.5g} | {m.low:.5g} to {m.high:.5g} | {m.n} |" for m in result.measurements
    ]
    head = ["| task | metric | value | 95% interval | n |", "|---|---|---|---|---|"]
    return "\n".join([f"By kbit, experiment {result.key}, with {result.device}:", "", *head, *rows])


def run_export(options: argparse.Namespace) -> None:
    """Write a packed checkpoint for another tool.

    Raises:
        ValueError, OSError: the format does not hold it exactly, or a file cannot be had.
    """
    check_choice("--format", options.format, FORMATS)
    from kbit.checkpoints.export import export_checkpoint

    done: Any = export_checkpoint(options.folder, options.format, options.out)
    print(done)
