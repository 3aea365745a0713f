"""Compare quantizers on one model: a table with every measure, its interval, and the paired difference to a reference.

    kbit.compare("nano-neox-98k", ["nf4", "int4", "mxfp4", kbit.QuantSpec(bits=3, data_type="nf")])

The first row is the 16-bit model. All rows are measured on the same items, so that differences are taken item by item:
their intervals are much narrower than those of the values.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kbit.analysis.statistics.degradation import widen_degenerate
from kbit.checks import check_choice
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import Measurement, decode_items, mean_accuracy, measure_mean
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key
from kbit.experiments.result import Result
from kbit.experiments.session import Session
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import copy_weights, quantize_model, refuse_quantized, restore_weights
from kbit.methods.report import plan_quantization
from kbit.models.config import ModelConfig
from kbit.models.inference import in_evaluation_mode
from kbit.models.loading import LoadedModel
from kbit.models.parameters import hash_weights
from kbit.notebook.quantizers import Quantizer, name_quantizers
from kbit.numerics.spec import BASELINE_BITS
from kbit.silence import silence_libraries
from kbit.store.records import read_as
from kbit.store.store import Store

BASELINE: Final = "16-bit"
# The measures of a language model, in the order of the columns; tasks' accuracies come after them.
METRICS: Final = ("cross_entropy", "kl_divergence", "top1_agreement")
Items = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Row:
    """What is known of one quantizer.

    Attributes:
        sizes: columns without an interval, such as total_bits.
        values: the measured numbers by column.
        items: the items behind each number by column, and within it by task. A number without them has no difference.
    """

    sizes: dict[str, float]
    values: dict[str, Measurement]
    items: dict[str, Items]


def compare(
    model: str | nn.Module,
    quantizers: Iterable[Quantizer],
    *,
    tasks: Sequence[str] = (),
    text: str | None = "nano_held_out",
    limit: int | None = None,
    windows: int | None = 64,
    reference: str = BASELINE,
    results: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Any = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Quantize one model in several ways, and return one row for each way, the 16-bit model first.

    Args:
        model: a short name, folder or hub id; or a causal language model of transformers, with its tokenizer; or any
            module, with inputs. A module of yours has its weights back at the end.
        quantizers: names of presets (kbit.presets()), QuantSpecs or QuantConfigs.
        tasks: lm-eval tasks to measure the accuracy on. See `kbit doctor` for those that are here.
        text: the text to measure cross entropy on: an embedded text's name, a path, or a text of the hub.
        limit: the number of items of each task. None takes all.
        windows: the number of windows of the text. None takes all.
        reference: the quantizer that the others are compared with, by the name in its row.
        results: a store to keep results in. What it has is not measured again. None keeps nothing.
        tokenizer: the tokenizer of a model that is given as an object.
        inputs: what a plain module is called with, a tensor [examples, ...] or a tuple. Its output's error is measured.
        device: cpu, cuda or cuda:N, for a model that is given by name. One that is given as an object stays on its own.

    Columns: quantizer, bits_per_param (of the quantized weights), total_bits (of the model), weight_error (relative),
    and for each measure its value, {measure}_low, {measure}_high (95%), and {measure}_difference to the reference with
    _difference_low and _difference_high, paired by item. Measures are cross_entropy and kl_divergence (nats per token),
    top1_agreement, acc (the mean over tasks, with each task's own if there are several), or output_error.

    Raises:
        ValueError: an unknown quantizer, task, text or reference, or a quantizer that the model cannot have, which the
            message names. What was measured before it is in the store.
        OSError: a model or text that is not there.
    """
    named = {BASELINE: QuantConfig(bits=BASELINE_BITS)} | name_quantizers(quantizers)
    check_choice("reference", reference, tuple(named))
    if isinstance(model, str | PreTrainedModel):
        evaluation = EvalConfig(tuple(tasks), limit=limit, perplexity=text, perplexity_windows=windows)
        rows = _measure_model(model, named, evaluation, results, tokenizer, device)
    elif inputs is None:
        raise ValueError(f"a {type(model).__name__} is no language model of transformers: give inputs to call it with")
    else:
        rows = _measure_module(model, named, inputs if isinstance(inputs, tuple) else (inputs,))
    return _tabulate(rows, reference)


def _measure_model(
    model: str | PreTrainedModel,
    named: Mapping[str, QuantConfig],
    evaluation: EvalConfig,
    results: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str,
) -> dict[str, Row]:
    silence_libraries()
    loaded = None if isinstance(model, str) else _describe_loaded(model, tokenizer)
    config = ModelConfig(str(model)) if loaded is None else _name_loaded(loaded)
    place = device if loaded is None else str(loaded.model.device)
    session: Session | None = None

    def run(quant: QuantConfig, store: Store) -> Row:
        nonlocal session
        experiment = Experiment(config, quant, evaluation)
        key = find_key(experiment)
        if not store.has(key):
            session = session or Session(config, place, loaded=loaded)
            store.write(session.run(experiment, key))
        [result] = read_as(Result, store.root, keys=[key])
        return _read_row(result)

    keep = tempfile.TemporaryDirectory() if results is None else nullcontext(str(results))
    with keep as folder:
        store = Store(folder)
        return _run_each(named, lambda quant: run(quant, store))


def _run_each(named: Mapping[str, QuantConfig], run: Callable[[QuantConfig], Row]) -> dict[str, Row]:
    """Return what `run` returns for each quantizer, behind a bar of progress."""
    rows = {}
    with tqdm(named.items(), unit="quantizer", disable=None) as bar:
        for name, quant in bar:
            bar.set_postfix_str(name)
            try:
                rows[name] = run(quant)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return rows


def _describe_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """Return a model of the user's own as if it had been loaded.

    Raises:
        ValueError: the tokenizer is missing, or the weights are quantized or no 16-bit values.
    """
    if tokenizer is None:
        raise ValueError("a model that is given as an object needs tokenizer=")
    refuse_quantized(model)
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in model.parameters() if p.is_floating_point()):
            return LoadedModel(model, tokenizer, str(dtype).removeprefix("torch."), hash_weights(model))
    raise ValueError(
        "the weights are no 16-bit values, so that the first row would be no 16-bit model: round them before, such as "
        "model.to(torch.bfloat16), or load the model by its name"
    )


def _name_loaded(loaded: LoadedModel) -> ModelConfig:
    """Return a configuration whose name tells the model by content, so that a store never mixes two models.

    The content is weights, configuration and tokenizer.
    """
    content = f"{loaded.revision} {loaded.model.config.to_json_string()} {json.dumps(loaded.tokenizer.get_vocab())}"
    content += f" {loaded.tokenizer.bos_token_id} {loaded.tokenizer.eos_token_id}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return ModelConfig(f"{type(loaded.model).__name__}@{digest}", str(loaded.model.dtype).removeprefix("torch."))


def _read_row(result: Result) -> Row:
    """Return the row of an experiment: sizes, the text's measures, and the accuracies."""
    numbers = {(m.task, m.metric): m for m in result.measurements}
    items = {(own.task, own.metric): decode_items(own) for own in result.items}
    values: dict[str, Measurement] = {}
    kept: dict[str, Items] = {}
    for metric in METRICS:
        for (task, of), number in numbers.items():
            if of == metric:
                values[metric] = number
                kept[metric] = {task: items[task, of]} if (task, of) in items else {}
    of_tasks = [task for task, metric in items if metric == "acc"]
    if others := [task.name for task in result.tasks if task.name not in of_tasks]:
        raise ValueError(f"{', '.join(others)} has no accuracy item by item: compare tasks that have one")
    if of_tasks:
        values["acc"] = mean_accuracy([numbers[task, "acc"] for task in of_tasks])
        kept["acc"] = {task: items[task, "acc"] for task in of_tasks}
    if len(of_tasks) > 1:
        values |= {f"acc {task}": numbers[task, "acc"] for task in of_tasks}
        kept |= {f"acc {task}": {task: items[task, "acc"]} for task in of_tasks}
    return Row(_list_sizes(result.bits_per_param, result.total_bits, result.weight_rmse), values, kept)


def _list_sizes(bits_per_param: float, total_bits: int, weight_error: float | None) -> dict[str, float]:
    lost = np.nan if weight_error is None else weight_error
    return {"bits_per_param": bits_per_param, "total_bits": total_bits, "weight_error": lost}


def _measure_module(module: nn.Module, named: Mapping[str, QuantConfig], inputs: tuple[Any, ...]) -> dict[str, Row]:
    """Return the relative error of a module's outputs, by round to nearest of every matrix that it has."""
    refuse_quantized(module)
    if not any(parameter.ndim > 1 for parameter in module.parameters()):
        raise ValueError(f"the {type(module).__name__} has no matrices to quantize")
    exact = _call(module, inputs)
    norms = exact.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)

    def run(quant: QuantConfig) -> Row:
        config = _with_all_matrices(quant, module)
        original = copy_weights(module, plan_quantization(module, config.without_allocation()))
        try:
            report = quantize_model(module, config)
            if not (config.is_baseline or report.quantized_parameters):
                raise ValueError(f"it leaves nothing of the {type(module).__name__} to quantize")
            errors = ((_call(module, inputs) - exact).norm(dim=1) / norms).numpy()
        finally:
            restore_weights(module, original)
        sizes = _list_sizes(report.bits_per_param, report.total_bits, report.weight_rmse)
        number = measure_mean("inputs", "output_error", errors.tolist())
        return Row(sizes, {"output_error": number}, {"output_error": {"inputs": errors}})

    return _run_each(named, run)


def _with_all_matrices(quant: QuantConfig, module: nn.Module) -> QuantConfig:
    """Return the quantizer for every matrix of a module, which need not have decoder layers."""
    if quant.is_baseline or quant.include is not None:
        return replace(quant, min_coverage=0.0)
    names = [re.escape(name) for name, parameter in module.named_parameters() if parameter.ndim > 1]
    return replace(quant, include=f"^({'|'.join(names)})$", min_coverage=0.0)


def _call(module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
    """Return a module's output [examples, numbers] in float64, without dropout."""
    with in_evaluation_mode(module), torch.no_grad():
        output = module(*inputs)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"the module returns a {type(output).__name__}: wrap it so that it returns one tensor")
    return output.detach().double().cpu().reshape(len(output), -1)


def _tabulate(rows: Mapping[str, Row], reference: str) -> pd.DataFrame:
    """Return the table of compare."""
    table = []
    for name, row in rows.items():
        cells: dict[str, Any] = {"quantizer": name, **row.sizes}
        for column, number in row.values.items():
            cells |= _list_cells(column, number)
            if difference := _subtract(row.items[column], rows[reference].items.get(column, {})):
                if column.startswith("acc") and name != reference:
                    difference = _widen(difference)
                cells |= _list_cells(f"{column}_difference", difference)
        table.append(cells)
    frame = pd.DataFrame(table)
    frame.attrs["reference"] = reference
    return frame


def _list_cells(column: str, number: Measurement) -> dict[str, float]:
    return {column: number.value, f"{column}_low": number.low, f"{column}_high": number.high}


def _widen(difference: Measurement) -> Measurement:
    """Return a difference of accuracies with an interval that is not empty, though it may be 0 in every item."""
    low, high = widen_degenerate(np.array(difference.low), np.array(difference.high), np.array(difference.n))
    return replace(difference, low=float(low), high=float(high))


def _subtract(items: Items, others: Items) -> Measurement | None:
    """Return the mean difference with its interval, paired by item within each task, or None without items."""
    if not items or items.keys() != others.keys():
        return None
    return mean_accuracy([measure_mean(task, "difference", (items[task] - others[task]).tolist()) for task in items])
