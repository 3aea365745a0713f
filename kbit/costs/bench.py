"""Variants of a model side by side: loaded together, timed in turns, each with its memory (kbit.evaluation.speed)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from kbit.checkpoints.loading import load_model
from kbit.checkpoints.packing import find_packed_report
from kbit.evaluation.config import SpeedConfig
from kbit.evaluation.measurement import Measurement
from kbit.evaluation.speed import measure
from kbit.evaluation.speed.generation import Generation, Workload, prepare
from kbit.evaluation.speed.record import SpeedRecord
from kbit.evaluation.speed.timing import OUT_OF_MEMORY, Ceilings, Clock, attempt, interleave, measure_ceilings
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.catalog import locate_model
from kbit.models.config import ModelConfig
from kbit.numerics.spec import BASELINE_BITS

# What quantized variants are compared with: the plain model in three dtypes, and bitsandbytes' NF4 layers.
DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BITSANDBYTES: Final = "bitsandbytes"
RIVALS: Final = (*DTYPES, BITSANDBYTES)


@dataclass(frozen=True)
class Variant:
    """A model in one precision, which is loaded when it is asked for.

    Attributes:
        model: the model.
        precision: what tables call it.
        bits: the bits of its quantized weights, or those of the dtype of plain ones: 16 or 32.
        load: a function that returns the model and the bits that are counted for it, or None where nothing counts.
    """

    model: ModelConfig
    precision: str
    bits: int
    load: Callable[[], tuple[Any, int | None]]


@dataclass(frozen=True)
class Benched:
    """What was measured of a variant.

    Attributes:
        variant: the variant.
        reason: why there is nothing else: memory ran out while it was loaded, perhaps beside others. Otherwise "".
        dtype: the dtype that it computes in.
        record: the machine, memory and paths.
        measurements: the numbers as a store has them.
        rounds: milliseconds per token in each round, by batch. The rounds of all variants are the same.
    """

    variant: Variant
    reason: str = ""
    dtype: str = ""
    record: SpeedRecord | None = None
    measurements: tuple[Measurement, ...] = ()
    rounds: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def make_variant(model: ModelConfig, quant: QuantConfig, device: str) -> Variant:
    """Return a model with a quantizer: packed, or with int8 products where the method has them, or plain."""
    options: dict[str, Any] = {"dtype": model.dtype, "device": device, **model.parts}

    def load() -> tuple[Any, int | None]:
        packs = not quant.is_baseline and quant.scheme is None
        loaded = load_model(model.name, packed_as=quant if packs else None, **options)
        report = find_packed_report(loaded.model)
        if report is None and loaded.checkpoint_quantization:
            raise ValueError(
                f"model.name={model.name} is {loaded.checkpoint_quantization}, whose weights kbit decodes: their speed "
                "would be that of plain weights. Plain and packed models are timed"
            )
        if report is None:
            report = quantize_model(loaded.model, quant, loaded.tokenizer)
        return loaded.model, report.total_bits

    bits = 8 * getattr(torch, model.dtype).itemsize if quant.is_baseline else quant.bits
    return Variant(model, f"{_name_quantizer(quant)} ({model.dtype})", bits, load)


def _name_quantizer(quant: QuantConfig) -> str:
    """Return a quantizer's name with every setting that is not the default."""
    words = [quant.label()]
    if not quant.is_baseline and quant.scheme is None:
        words += [] if quant.block_size == QuantConfig().block_size else [f"block {quant.block_size or 'whole'}"]
        words += [] if quant.method == QuantConfig().method else [quant.method]
    return " ".join([*words, *(f"{name}={value}" for name, value in dict(quant.label_details).items())])


def make_rival(model: ModelConfig, name: str, device: str) -> Variant:
    """Return what a model's quantized variants are compared with, by a name of RIVALS."""
    if name == BITSANDBYTES:
        if model.adapter is not None or model.gguf_file is not None:
            raise ValueError(f"bench.against={name} loads plain safetensors, without model.adapter or model.gguf_file")
        return Variant(model, "bitsandbytes nf4 (bfloat16)", 4, lambda: (_load_bitsandbytes(model, device), None))
    plain = ModelConfig(**{**vars(model), "dtype": DTYPES[name]})
    made = make_variant(plain, QuantConfig(bits=BASELINE_BITS), device)
    return Variant(model, name, made.bits, made.load)


def check_rival(name: str) -> None:
    """Raise ValueError if a rival cannot be had here."""
    if name == BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("bench.against=bitsandbytes needs the package: pip install 'kbit[bitsandbytes]'")


def _load_bitsandbytes(model: ModelConfig, device: str) -> Any:
    """Return a model whose linear layers are bitsandbytes' with NF4 codes in blocks of 64, in bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    made: Any = AutoModelForCausalLM.from_pretrained(
        locate_model(model.name),
        quantization_config=asked,
        dtype=torch.bfloat16,
        device_map=device,
        revision=model.revision or "main",
        use_safetensors=True,
    )
    return made.eval()


def bench_model(
    variants: Sequence[Variant], config: SpeedConfig, make_clock: Callable[[torch.device], Clock]
) -> Iterator[Benched]:
    """Load all variants of a model, time them in turns, and yield what was measured, in their order.

    Every repetition goes through all variants and batches once, so that other work on the machine meets all alike. What
    runs out of memory does so beside the others, and its reason says so: alone it might fit.
    """
    loaded: dict[Variant, tuple[Any, int | None, float]] = {}
    unloaded: dict[Variant, str] = {}
    for variant in variants:
        start = time.perf_counter()
        found = attempt(variant.load)
        if found is None:
            unloaded[variant] = _explain(len(loaded))
        else:
            loaded[variant] = (*found, time.perf_counter() - start)
    if not loaded:
        yield from (Benched(variant, unloaded[variant]) for variant in variants)
        return
    device = next(iter(loaded.values()))[0].device
    clock = make_clock(device)
    before = measure_ceilings(device, clock)
    works = [Workload(batch, config.prompt, config.new) for batch in config.batches]
    calls = {(v, work): prepare(model, work, clock) for work in works for v, (model, _, _) in loaded.items()}
    done, reasons = interleave(calls, config.repetitions)
    ceilings = (before, measure_ceilings(device, clock))
    for variant in variants:
        if variant not in loaded:
            yield Benched(variant, unloaded[variant])
            continue
        of_variant = {work: done.get((variant, work), []) for work in works}
        missing = {work: _explain(len(loaded) - 1) if (variant, work) in reasons else "" for work in works}
        yield _describe(variant, loaded[variant], config, ceilings, of_variant, missing)


def _explain(others: int) -> str:
    """Return the reason of what ran out of memory beside so many other models."""
    return f"{OUT_OF_MEMORY} beside {others} other{'s' if others > 1 else ''}" if others else OUT_OF_MEMORY


def _describe(
    variant: Variant,
    loaded: tuple[Any, int | None, float],
    config: SpeedConfig,
    ceilings: Sequence[Ceilings],
    done: Mapping[Workload, Sequence[Generation]],
    reasons: Mapping[Workload, str],
) -> Benched:
    model, bits, seconds = loaded
    batches = [measure.record_batch(model, work, reason) for work, reason in reasons.items()]
    record = measure.make_record(model, config, bits, ceilings, batches)
    numbers = measure.list_model_numbers(record, seconds)
    for work, generations in done.items():
        if generations:
            numbers += measure.list_batch_numbers(work, generations)[0]
    numbers += measure.list_peaks(batches)
    rounds = {work.batch: tuple(one.find_ms_per_token(work) for one in of_work) for work, of_work in done.items()}
    dtype = str(model.dtype).removeprefix("torch.")
    return Benched(variant, "", dtype, record, tuple(numbers), rounds)
