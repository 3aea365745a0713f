"""Makes random stores: any subset of experiments, in many settings, with what goes wrong in real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import strategies as st

from kbit.store.rows import EXPERIMENT_COLUMNS, MEASUREMENT_COLUMNS

SCHEMA: Final = pa.schema([*EXPERIMENT_COLUMNS.items(), *MEASUREMENT_COLUMNS.items()])
PARAMETERS: Final = (10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6)
# opt's models have published values
FAMILIES: Final = {
    "opt": ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b"),
    "own$_^": ("a$b", "b_{c}", "c^2\\", "d%&<>é"),
    "third": ("t-1m", "t-4m", "t-16m", "t-64m"),
}
PRECISIONS: Final = (2, 3, 4, 5, 6, 8)
RTN: Final[dict[str, Any]] = {"method": "rtn", "method_options": "", "outlier_fraction": 0.0, "block_size": 64}
INT8: Final[dict[str, Any]] = {"data_type": "int", "bits": 8, "layout": "row", "block_size": None}
SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    *(RTN | {"data_type": name} for name in ("float", "int", "quantile", "nf", "dynamic", "_mine$")),
    *(RTN | {"data_type": "int", "block_size": size} for size in (128, 1024, None)),
    *(RTN | {"data_type": "float", "block_size": size} for size in (128, 1024)),
    *(RTN | {"data_type": "float", "exponent_bits": bits} for bits in (1, 2, 3)),
    *(RTN | {"data_type": "int", "method": "gptq", "block_size": size} for size in (64, 1024, None)),
    RTN | {"data_type": "int", "method": "mine"},
    RTN | {"data_type": "nf", "outlier_fraction": 0.02, "outlier_selection": "proxy"},
    RTN | {"data_type": "nf", "outlier_fraction": 0.02, "outlier_selection": "random", "seed": 0},
    RTN | {"data_type": "nf", "scale_format": "fp8"},
    *(RTN | {"data_type": "nf", "bits": 3, "exclude": rf"layers\.(?!{layer}\.)"} for layer in (0, 1)),
    *(RTN | INT8 | {"method": method} for method in ("llm_int8", "absmax", "vectorwise")),
)
# settings that one figure compares: data types, block sizes, exponents, methods, outliers, layers, int8 methods
GROUPS: Final = (
    (0, 1, 2, 3, 4),
    (1, 6, 7, 8),
    (0, 11, 12, 13),
    (0, 14, 15, 16),
    (1, 14, 17),
    (3, 18, 19),
    (21, 22),
    (23, 24),
)
FEATURES: Final = (
    "features", "layers_affected", "positions_affected", "top1_probability", "top1_probability_without_features",
    "top1_probability_without_random", "cross_entropy_without_features", "cross_entropy_without_random",
)  # fmt: skip
TASKS: Final = ("piqa", "winogrande")


@dataclass(frozen=True)
class Shape:
    """What a random store holds.

    Attributes:
        families: how many families, 1 to 3, and of each how many sizes.
        precisions: the precisions measured, 16 among them or not.
        settings: places in SETTINGS.
        missing: the share of the experiments that failed.
        unmeasured: the share of the measurements that are missing.
        mixed: the share of the experiments that were measured in another way.
        certain: the share of the values with an interval.
        digits: decimal digits of values. Few digits give ties.
        features: whether outlier features and their proxies were measured.
        seed: the seed of everything else.
    """

    families: tuple[int, ...]
    precisions: tuple[int, ...]
    settings: tuple[int, ...]
    missing: float
    unmeasured: float
    mixed: float
    certain: float
    digits: int
    features: bool
    seed: int


def draw_shapes() -> st.SearchStrategy[Shape]:
    """Return a strategy of Shapes, most of them with enough experiments for several figures."""
    return st.builds(
        Shape,
        st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        st.sets(st.sampled_from((*PRECISIONS, 16)), max_size=3).map(lambda bits: tuple(sorted({3, 4, 16} ^ bits))),
        st.tuples(st.sampled_from(GROUPS), st.sets(st.integers(0, len(SETTINGS) - 1), max_size=2)).map(
            lambda pair: tuple(sorted({*pair[0], *pair[1]}))
        ),
        st.sampled_from((0.0, 0.1, 0.5)),
        st.sampled_from((0.0, 0.1, 0.5)),
        st.sampled_from((0.0, 0.0, 0.02)),
        st.sampled_from((1.0, 1.0, 0.9, 0.0)),
        st.sampled_from((1, 2, 6)),
        st.booleans(),
        st.integers(0, 2**16),
    )


def make_store(shape: Shape) -> pd.DataFrame:
    """Return the results of a store of this shape, with the columns and types of kbit.read_results."""
    rng = np.random.default_rng(shape.seed)
    rows: list[dict[str, Any]] = []
    for (family, models), sizes in zip(FAMILIES.items(), shape.families, strict=False):
        for model, parameters in list(zip(models, PARAMETERS, strict=True))[:sizes]:
            about = {"family": family, "model": model, "parameters": parameters, "architecture": "Toy"}
            for setting in list_quantizers(shape):
                if rng.random() >= shape.missing:
                    rows += make_rows(about | setting | {"key": f"k{len(rows):05d}"}, shape, rng)
    table: pd.DataFrame = pa.Table.from_pylist(rows, schema=SCHEMA).to_pandas()
    return table.astype({"exponent_bits": "Int64", "block_size": "Int64"})


def list_quantizers(shape: Shape) -> list[dict[str, Any]]:
    """Return the columns of every quantizer of a store, each once."""
    found: dict[str, dict[str, Any]] = {}
    for bits in shape.precisions:
        for place in shape.settings if bits < 16 else ():
            setting = {"bits": bits} | SETTINGS[place]
            if setting["data_type"] == "float":
                usual = {2: 1, 3: 2}.get(bits, 3)
                setting = {"exponent_bits": usual, "float_bias": "ieee"} | setting
                if int(str(setting["exponent_bits"])) >= int(str(setting["bits"])):
                    continue
            found[repr(sorted(setting.items()))] = setting
        if bits == 16:
            found["16"] = {"bits": 16}
    return list(found.values())


def make_rows(about: dict[str, Any], shape: Shape, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the rows of one experiment."""
    bits, parameters = about["bits"], about["parameters"]
    block = about.get("block_size") or 10**9
    own = bits + (0.0 if bits == 16 else 16 / block)
    loss = 6.0 - 0.2 * np.log(parameters) + (0.0 if bits == 16 else 2.0 * 4.0 ** (2 - bits))
    loss += float(rng.normal(0, 0.02))
    way = "bfloat16, 8 items" if rng.random() < shape.mixed else "float32, all items"
    about = about | {"quantized_parameters": parameters, "bits_per_param": own, "total_bits": int(parameters * own)}
    about |= {"evaluation": way, "dtype": "float32", "weight_rmse": None if bits == 16 else 2.0**-bits}
    values = [(task, "acc", 0.8 - 0.1 * loss, 100) for task in ("mean_zero_shot", *TASKS)]
    values += [("text", "cross_entropy", loss, 64), ("wikitext2", "perplexity", float(np.exp(loss)), 64)]
    values += [("text", "kl_divergence", 0.1 * loss, 64)] if bits < 16 else []
    if shape.features:
        number = int(rng.integers(0, 3))
        values += [("features/text", name, number * 0.25, 16) for name in FEATURES]
        relations = ("feed_forward", "attention", "control")
        values += [(f"proxy/{name}", "spearman_weight_std", float(rng.random()), 1) for name in relations]
    rows = []
    for task, metric, value, n in values:
        if rng.random() >= shape.unmeasured:
            value = round(value, shape.digits)
            half = 0.01 if rng.random() < shape.certain else float("nan")
            interval = {"low": value - half, "high": value + 1.5 * half}
            rows.append(about | {"task": task, "metric": metric, "value": value, "n": n} | interval)
    return rows
