"""The command line: `kbit run | plan | figures | report | results | outliers | models | doctor`."""

from __future__ import annotations

import argparse
import os
import sys

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
    from kbit.cli.figures import draw_figures, make_report
    from kbit.cli.hydra_app import as_multirun, run_hydra
    from kbit.cli.results import run_results

    match command:
        case "run":
            run_hydra(arguments)
        case "plan":
            run_hydra([*as_multirun(arguments), "hydra.launcher.plan_only=true"], "plan")
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
            run_hydra([*as_multirun(arguments), "hydra.launcher.examine_only=true"])
        case "-h" | "--help" | "help":
            print(_USAGE, end="")
        case "--version":
            from importlib.metadata import version

            print(f"kbit {version('kbit')}")
        case _:
            allowed = "run, plan, figures, report, results, outliers, models, doctor"
            sys.exit(f"kbit: unknown command {command!r}; allowed are {allowed}")


def list_models(arguments: list[str]) -> None:
    """Print the short names and where their weights are: `kbit models`."""
    argparse.ArgumentParser("kbit models", description="List the models that have a short name.").parse_args(arguments)
    from kbit.models.catalog import STUDIED

    for model in STUDIED.values():
        print(f"{model.name:24} {model.family:14} {model.hub_id or 'embedded'}")


if __name__ == "__main__":
    main()
