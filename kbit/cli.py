"""The command line: `kbit run | plan | figures | report | results | outliers | models | doctor`."""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from kbit.config import RunConfig, StudyConfig
from kbit.overrides import find_unknown_key, list_files, refuse_several_studies, run_explained
from kbit.results_command import run_results, select_rows

_USAGE = """\
usage: kbit <command> [arguments]

  run      quantize and evaluate one model, or with -m / +sweeps=... a grid   kbit run --help
  plan     say what the same arguments would run, and run nothing
  figures  draw the figures that the results allow                            kbit figures --help
  report   write one page with every experiment, to open in a browser         kbit report --help
  results  print, export, delete, compact or merge results                    kbit results --help
  outliers find a model's emergent outlier features; arguments as of run      kbit outliers --help
  models   list the models that have a short name
  doctor   say what works here, and whether all that the same arguments ask for can be had     kbit doctor --help

examples:
  kbit run quant.bits=3 quant.data_type=nf
  kbit run -m quant.bits=3,4,8,16 model.name=nano-neox-98k,nano-neox-332k
  kbit run +sweeps=nano/bit_level
  kbit figures --results results --out figures
"""


_DOCTOR_USAGE = """\
usage: kbit doctor [arguments of run]

Say what works here: versions, device, Ray, hub, and whether every model, task and text that the same arguments of
`kbit run` ask for can be had. Nothing is run. Tasks and texts are loaded, from the hub where they are not local.
Exit code 1 if something asked for is missing.

examples:
  kbit doctor                                    the default experiment
  kbit doctor eval=paper device=cuda
  kbit doctor model.name=opt-125m,pythia-70m-v0
  kbit doctor +sweeps=nano/quick                 all models, tasks and texts of a study
"""

_OUTLIERS_USAGE = """\
usage: kbit outliers [arguments of run]

Find the emergent outlier features of a model (LLM.int8(), section 4): hidden dimensions with large values in many
layers and at many positions of a text; what zeroing them does, beside as many random dimensions; and how well the
weights tell which units have large values (the k-bit paper, table 2). The same as
`kbit run quant.bits=16 eval.tasks=[] eval.features.measure=true`: every argument of `kbit run --help` can be given.

  eval.features.magnitude=6.0     from which on a value is large
  eval.features.layers=0.25       least share of layers in which a feature is large
  eval.features.positions=0.06    least share of positions at which it is
  eval.perplexity=nano_held_out   the text: a name or a file
  eval.perplexity_windows=256     at most so many windows of it

examples:
  kbit outliers model.name=nano-neox-7m
  kbit outliers -m model.name=nano-neox-1m,nano-neox-3m
  kbit outliers quant.bits=8 quant.method=llm_int8     the same of a quantized model
"""


def main() -> None:
    """Entry point of the console script."""
    command, *arguments = sys.argv[1:] or ["--help"]
    try:
        run_command(command, arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: `kbit results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run_command(command: str, arguments: list[str]) -> None:
    """Run one command of the console script."""
    match command:
        case "run":
            run_hydra(arguments)
        case "plan":
            run_hydra([*_multirun(arguments), "hydra.launcher.plan_only=true"], "plan")
        case "figures":
            draw_figures(arguments)
        case "report":
            make_report(arguments)
        case "outliers" if {"-h", "--help"} & set(arguments):
            print(_OUTLIERS_USAGE, end="")
        case "outliers":
            run_hydra(["quant.bits=16", "eval.tasks=[]", "eval.features.measure=true", *arguments])
        case "results":
            run_results(arguments)
        case "models":
            list_models(arguments)
        case "doctor" if {"-h", "--help"} & set(arguments):
            print(_DOCTOR_USAGE, end="")
        case "doctor":
            run_hydra([*_multirun(arguments), "hydra.launcher.examine_only=true"])
        case "-h" | "--help" | "help":
            print(_USAGE, end="")
        case "--version":
            from importlib.metadata import version

            print(f"kbit {version('kbit')}")
        case _:
            allowed = "run, plan, figures, report, results, outliers, models, doctor"
            sys.exit(f"kbit: unknown command {command!r}; allowed are {allowed}")


def run_hydra(arguments: list[str], command: str = "run") -> None:
    """Run Hydra on these command-line arguments, as `kbit run` does."""
    register_schema()
    if any(re.match(r"\+{1,2}sweeps(@\w*)?=[^\[]*,", argument) for argument in arguments):
        arguments = _multirun(arguments)  # several studies are never one run
    flags_first = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))  # argparse insists
    _refuse(arguments)
    sys.argv = [f"kbit {command}", *flags_first]
    run_explained(_hydra_main, "kbit")


def register_schema() -> None:
    """Tell Hydra the schema that every key and value is checked against, and where it may put its own files."""
    schema = OmegaConf.structured(RunConfig)
    _make_writable(schema)
    ConfigStore.instance().store(name="run_schema", node=schema)
    # Hydra would check conf/hydra/launcher/basic.yaml against the schema of its own launcher of that name. Not in
    # hydra_plugins/, which every Hydra application of the environment imports.
    Plugins.instance()  # registers Hydra's launchers
    ConfigStore.instance().repo["hydra"]["launcher"].pop("basic.yaml", None)
    OmegaConf.register_new_resolver("kbit.scratch", _scratch_folder, replace=True)
    OmegaConf.register_new_resolver("kbit.studies", lambda: ", ".join(list_files("sweeps")), replace=True)
    OmegaConf.register_new_resolver("kbit.presets", lambda: ", ".join(list_files("conf/quant")), replace=True)


@hydra.main(version_base="1.3", config_path="pkg://kbit.conf", config_name="run")
def _hydra_main(config: DictConfig) -> None:
    from kbit.run import run_configs, to_run_config

    run_config = to_run_config(config)
    if run_config.study != StudyConfig():
        sys.exit("kbit: error: a study is a multirun: add -m, or `hydra: {mode: MULTIRUN}` to its file")
    run_configs([run_config], engine="process")


def draw_figures(arguments: list[str]) -> None:
    """Draw figures from a store: `kbit figures`."""
    parser = argparse.ArgumentParser("kbit figures", description="Draw the figures that the results allow.")
    parser.add_argument("names", nargs="*", help="figures to draw (default: all that the results allow)")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--where", help="draw these rows only: a pandas query, such as \"data_type == 'nf'\"")
    parser.add_argument("--out", default="figures", type=Path, help="folder for PNG, SVG and CSV (default: figures)")
    options = parser.parse_args(arguments)
    from kbit.analysis.figures import save_figures
    from kbit.analysis.findings import finding
    from kbit.store import read_results

    try:
        results = read_results(options.results)
        if options.where:
            results = select_rows(results, options.where)
            if results.empty:
                raise ValueError(f"--where {options.where!r} finds none of the rows of {options.results}")
        figures = save_figures(results, options.out, options.names or None)
        for figure in figures:
            shown = f"not drawn: {figure.skipped}" if figure.skipped else f"{figure.paths[0]}\n    {figure.verdict}"
            print(f"{figure.name}: {shown}")
        if not any(figure.paths for figure in figures):
            which = f"none of the figures {' '.join(options.names)}" if options.names else "no figure"
            sys.exit(f"kbit: error: these results allow {which}")
        print(f"the same as SVG, and what is drawn as CSV, in {options.out.absolute()}")
        print(f"\n{finding(results)}")
        missing = [figure.name for figure in figures if figure.skipped]
        if options.names and missing:
            sys.exit(f"kbit: error: not drawn: {' '.join(missing)}")
    except (ValueError, OSError) as error:
        sys.exit(f"kbit: error: {error}")


def make_report(arguments: list[str]) -> None:
    """Write the report of a store: `kbit report`."""
    parser = argparse.ArgumentParser("kbit report", description="Write one page with every experiment of a store.")
    parser.add_argument("--results", default="results", help="folder of the store (default: results)")
    parser.add_argument("--out", default="report.html", type=Path, help="the page (default: report.html)")
    options = parser.parse_args(arguments)
    from kbit.analysis.report import write_report

    try:
        write_report(options.results, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"kbit: error: {error}")
    print(f"{options.out.absolute()}: open it in a browser, no network is needed")


def list_models(arguments: list[str]) -> None:
    """Print the short names and where their weights are: `kbit models`."""
    argparse.ArgumentParser("kbit models", description="List the models that have a short name.").parse_args(arguments)
    from kbit.families import STUDIED

    for model in STUDIED.values():
        print(f"{model.name:24} {model.family:14} {model.hub_id or 'embedded'}")


def _refuse(arguments: list[str]) -> None:
    """Exit, before Hydra sees them, if a key is unknown or a study is lost; Hydra's own advice is to add the key."""
    hints = [refuse_several_studies(arguments)]
    for argument in arguments:
        key, is_override, _ = argument.partition("=")
        name = key.lstrip("+~")
        if key == "sweeps":
            hints.append(f"{key}: a ready study is added, not set: +{argument}")
        elif is_override and not key.startswith("-") and not name.startswith(("hydra", "sweeps")) and "@" not in name:
            hints.append(find_unknown_key(name))
    if any(hints):
        sys.exit("\n".join(f"kbit: error: {hint}" for hint in hints if hint))


def _multirun(arguments: list[str]) -> list[str]:
    return arguments if {"-m", "--multirun"} & set(arguments) else ["-m", *arguments]


def _make_writable(node: Any) -> None:
    """Lift the read-only flag that OmegaConf puts on frozen dataclasses, so that overrides can be applied."""
    node._set_flag("readonly", None)
    for key in node if isinstance(node, DictConfig) else ():
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


@functools.cache
def _scratch_folder() -> str:
    """Return a temporary folder for the file that Hydra's sweeper insists on writing; removed at exit."""
    folder = tempfile.mkdtemp(prefix="kbit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
