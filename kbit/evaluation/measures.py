"""All measures, in the order of their numbers in a result: kbit's own, then those of eval.measures.

To add one of kbit's own: write its class (kbit.evaluation.measure) in a module of this folder, its fields in
kbit.evaluation.config and in the experiment's key, and its instance in MEASURES.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, Final

import torch

from kbit.checks import check_choice
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measure import Measure, Measured, Subject, check_read
from kbit.evaluation.measure_sources import MeasureSource, read_source
from kbit.evaluation.measurement import ItemValues, Measurement, MeasureRecord, NonFiniteError, check_own
from kbit.evaluation.outlier_features import OutlierFeatures
from kbit.evaluation.perplexity import Perplexity
from kbit.evaluation.speed.measure import Speed
from kbit.evaluation.zero_shot import ZeroShot

RESERVED: Final = ("features", "proxy", "mean_zero_shot", "speed", "training")  # tasks of kbit's own measures


@dataclass
class LoadedMeasures:
    """The measures of one's own that a model was measured by, by what identifies them."""

    by_identity: dict[str, tuple[MeasureSource, Measure]] = field(default_factory=dict)


class UserMeasures(Measure):
    """The measures of eval.measures as one. They run without gradients."""

    name = "user"
    fields = ("measures",)

    @torch.no_grad()
    def prepare(self, subject: Subject) -> None:
        """Import the measures that the loaded model was not measured by yet, and let each prepare."""
        asked, kept = subject.config.measures, subject.memory.recall(LoadedMeasures).by_identity
        sources = [read_source(name) for name in asked]
        found = sorted(source.identity for source in sources)
        check_read(f"eval.measures={list(asked)}", found, subject.identity.get("measures", []))
        for identity in kept.keys() - {source.identity for source in sources}:
            del kept[identity]
        for source in sources:
            if source.identity not in kept:
                kept[source.identity] = (source, make_measure(source))
        _check_names([kept[source.identity][1].name for source in sources], _list_taken(subject.config))
        for source in sources:
            kept[source.identity][1].prepare(subject)

    @torch.no_grad()
    def run(self, subject: Subject) -> Measured:
        """Run each measure.

        Raises:
            ValueError: a measurement's task is not the measure's own, or JSON cannot hold a number or note.
            NonFiniteError: a measured value is NaN or infinite.
        """
        kept = subject.memory.recall(LoadedMeasures).by_identity
        done: list[tuple[MeasureRecord, Measured]] = []
        for source, measure in (kept[identity] for identity in subject.identity.get("measures", [])):
            measured = _run_measure(source, measure, subject)
            check_own(measure.name, measured.measurements, measured.items)
            _check_plain(measure.name, measured)
            done.append((MeasureRecord(measure.name, source.sha256, dict(measured.notes)), measured))
        return Measured(
            [measurement for _, measured in done for measurement in measured.measurements],
            [items for _, measured in done for items in measured.items],
            sum(measured.tokens for _, measured in done),
            {"measures": tuple(record for record, _ in done)},
        )


MEASURES: Final[tuple[Measure, ...]] = (ZeroShot(), Perplexity(), OutlierFeatures(), Speed(), UserMeasures())


def check_measures(config: EvalConfig) -> None:
    """Import the measures that eval.measures names, so that what is wrong with one is said before any work.

    Raises:
        ValueError: see read_source and make_measure, or two of them have one name.
    """
    _check_names([make_measure(read_source(name)).name for name in config.measures], _list_taken(config))


def make_measure(source: MeasureSource) -> Measure:
    """Return a new instance of a measure.

    Raises:
        ValueError: the file has no such class, cannot be imported, or the class is no Measure.
    """
    module = _import_source(source)
    own = tuple(name for name, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__)
    check_choice(f"eval.measures={source.asked!r}: the class", source.cls, own)
    try:
        measure: Any = vars(module)[source.cls]()
    except TypeError as error:  # its __init__ wants arguments
        raise ValueError(f"eval.measures={source.asked!r}: {error}; a measure is made without arguments") from error
    missing = [] if isinstance(getattr(measure, "name", None), str) else ["name"]
    missing += [name for name in ("fields", "prepare") if not hasattr(measure, name)]
    missing += ["run"] if getattr(type(measure), "run", Measure.run) is Measure.run else []
    if missing:
        raise ValueError(
            f"eval.measures={source.asked!r} is no measure: it has no {', '.join(missing)} (inherit from "
            "kbit.evaluation.measure.Measure)"
        )
    made: Measure = measure
    return made


def _is_list_of(part: object, kind: type[object]) -> bool:
    return isinstance(part, list | tuple) and all(isinstance(value, kind) for value in part)


def _run_measure(source: MeasureSource, measure: Measure, subject: Subject) -> Measured:
    """Return what a measure returns, and name the measure in what it raises.

    Raises:
        ValueError: the measure raised an error, or returned no lists of numbers.
        NonFiniteError: the model gave NaN or Inf.
    """
    try:
        measured: Any = measure.run(subject)
    except NonFiniteError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise ValueError(f"eval.measures={source.asked!r}: run() raised {type(error).__name__}: {error}") from error
    parts = ((measured.measurements, Measurement), (measured.items, ItemValues)) if type(measured) is Measured else ()
    if not parts or not all(
        isinstance(part, list | tuple) and all(isinstance(x, k) for x in part) for part, k in parts
    ):
        raise ValueError(
            f"eval.measures={source.asked!r}: run() returned {type(measured).__name__}, not Measured(a list of "
            "Measurement, a list of ItemValues)"
        )
    checked: Measured = measured
    return checked


@functools.lru_cache(maxsize=64)
def _import_source(source: MeasureSource) -> ModuleType:
    """Return the module of a source file. An edited file is another source, so that it is imported again."""
    is_file = source.asked.rpartition(":")[0].endswith(".py")
    # a file of any name must not take the place of a library of that name
    name = f"kbit_measure_{source.sha256[:16]}" if is_file else source.module
    folder = str(source.path.parents[0 if is_file else source.module.count(".")])
    if folder not in sys.path:
        sys.path.append(folder)  # for what the file imports from beside itself
    loader = SourceFileLoader(name, str(source.path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        if spec.parent:
            importlib.import_module(spec.parent)
        sys.modules[name] = module
        # not loader.exec_module, which reads the file again, or a compiled one of the same second
        exec(loader.source_to_code(source.content, str(source.path)), vars(module))
    except Exception as error:  # whatever a user's file raises when it is imported
        sys.modules.pop(name, None)
        raise ValueError(
            f"eval.measures={source.asked!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _check_plain(name: str, measured: Measured) -> None:
    """Raise ValueError if a number or note is not a plain value, such as a tensor: no store could write it."""
    try:
        json.dumps([[dataclasses.asdict(m) for m in measured.measurements], dict(measured.notes)])
    except TypeError as error:
        raise ValueError(f"the measure {name!r} gave something that is no plain value: {error}") from error


def _list_taken(config: EvalConfig) -> list[str]:
    return [*RESERVED, *config.tasks, *filter(None, [config.perplexity])]


def _check_names(names: Sequence[str], taken: Iterable[str]) -> None:
    """Raise ValueError if the numbers of a measure could be taken for those of another one."""
    repeated = [name for number, name in enumerate(names) if name in (*taken, *names[:number])]
    if repeated:
        raise ValueError(f"eval.measures: the name {repeated[0]!r} belongs to another measure, task or text already")
    if wrong := [name for name in names if not name or "/" in name]:
        raise ValueError(f"eval.measures: a measure's name is a word without '/', not {wrong[0]!r}")
