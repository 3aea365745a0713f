"""Which model fits where: tables of each model's memory, and of the largest model for each hardware and precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from kbit.costs.hardware import GB, Hardware
from kbit.costs.memory import Use, count_memory, find_longest_context
from kbit.costs.shapes import ModelShape
from kbit.methods.config import QuantConfig


def parse_precisions(text: str) -> dict[str, QuantConfig]:
    """Return the quantizers that are named, such as 16,4,nf4_dq, by name. A number of bits is nf in blocks of 64.

    Raises:
        ValueError: one is neither a number of bits nor the name of a quantizer.
    """
    found = {}
    for name in text.split(","):
        asked = name.strip()
        try:
            quant = QuantConfig(bits=int(asked)) if asked.isdecimal() else QuantConfig.from_name(asked)
        except ValueError as error:
            raise ValueError(f"--bits {asked}: {error}") from None
        found[quant.label() if asked.isdecimal() else asked] = quant
    return found


def tabulate_memory(
    shapes: Iterable[ModelShape],
    precisions: Mapping[str, QuantConfig],
    hardware: Sequence[Hardware],
    use: Use,
    overhead: float,
) -> pd.DataFrame:
    """Return what each model takes at each precision, in GB, and how much of each hardware that is.

    Columns: model, precision, weights, training, cache, activations, total, and for each hardware the cards that the
    model needs and the longest context that fits on those that are there (0: the model does not fit).

    Args:
        shapes: the models.
        precisions: the quantizers, by the names that the table gives them.
        hardware: what it shall run on.
        use: how the model is used.
        overhead: bytes that each card loses to its driver's context and the libraries' workspaces.
    """
    rows = []
    for shape in shapes:
        for name, quant in precisions.items():
            memory = count_memory(shape, quant, use)
            row: dict[str, object] = {"model": shape.name, "precision": name}
            row |= {part: value / GB for part, value in dataclasses.asdict(memory).items()}
            row["total"] = memory.total / GB
            for one in hardware:
                room = max(0.0, one.card_bytes - overhead)
                row[f"{one.name}: cards"] = math.ceil(memory.total / room) if room else None
                row[f"{one.name}: context"] = _find_context(shape, quant, one, use, overhead)
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_largest(
    shapes: Sequence[ModelShape],
    precisions: Mapping[str, QuantConfig],
    hardware: Sequence[Hardware],
    use: Use,
    overhead: float,
) -> pd.DataFrame:
    """Return the largest model that fits: a row for each hardware, a column for each precision, "-" if none fits.

    Equally large models stand together. See tabulate_memory for the arguments.
    """
    table = {}
    for one in hardware:
        available = one.count_available(overhead)
        fitting = {
            name: [shape for shape in shapes if count_memory(shape, quant, use).total <= available]
            for name, quant in precisions.items()
        }
        table[one.name] = {name: _name_largest(fits) for name, fits in fitting.items()}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("hardware").reset_index()


def _find_context(shape: ModelShape, quant: QuantConfig, hardware: Hardware, use: Use, overhead: float) -> int:
    def count(context: int) -> int:
        return count_memory(shape, quant, dataclasses.replace(use, context=context)).total

    return find_longest_context(shape, count, hardware.count_available(overhead))


def _name_largest(shapes: Sequence[ModelShape]) -> str:
    largest = max((shape.parameters for shape in shapes), default=0)
    return ", ".join(shape.name for shape in shapes if shape.parameters == largest) or "-"
