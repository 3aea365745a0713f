"""KbitConfig: how a checkpoint is quantized, as transformers takes it and as config.json has it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from kbit.checks import non_defaults, suggest
from kbit.layers.packed_weight import PackedLayout
from kbit.methods.config import OPTION_GROUPS, QuantConfig
from kbit.models.checkpoint_files import PACKED_METHOD
from kbit.models.transformers_private import let_configurations_meet
from kbit.numerics.scale_formats import name_dtype

_FIELDS: Final = tuple(field.name for field in dataclasses.fields(QuantConfig))


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What kbit.load_model does to a plain model before it is quantized, as for every 16-bit baseline.

    The model is read in its checkpoint's own dtype and rounded to 16 bits. Then it is cast.

    Attributes:
        dtype: the dtype in which the model computes.
        read_tokenizer: a function that returns the tokenizer for a model, which methods with a text need.
    """

    dtype: torch.dtype
    read_tokenizer: Callable[[Any], Any]

    def round(self, values: torch.Tensor, checkpoint_dtype: torch.dtype) -> torch.Tensor:
        """Return values of a checkpoint, rounded to its 16 bits and cast."""
        return values.to(find_rounded(checkpoint_dtype)).to(self.dtype)


def find_rounded(checkpoint_dtype: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype to which the weights of a checkpoint are rounded."""
    return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 else torch.float16


@register_quantization_config(PACKED_METHOD)
class KbitConfig(QuantizationConfigMixin):
    """How a model is quantized when it is loaded, and how a packed checkpoint is.

        AutoModelForCausalLM.from_pretrained(name, quantization_config=KbitConfig(bits=3, data_type="nf"))

    A checkpoint that is packed already stays as it was packed. With another configuration it is refused.

    Args:
        fields: the fields of kbit.QuantConfig, such as bits=3, data_type="nf", method="gptq". Groups such as
            calibration may be dictionaries.
        weight_dtype: the dtype of the weights that were quantized, in which codes are decoded. None: not known yet.
        parts: what single weights store beyond codes and scales: {name: {"input_scales": True, "outlier_columns": 3}}.
        quant_method: always "kbit".
        made_by: the version of kbit that packed the checkpoint, and the model that it was made of.

    Raises:
        ValueError: a field is unknown or has a wrong value, or nothing would be packed (16 bits, an int8 method).
    """

    def __init__(
        self,
        *,
        weight_dtype: str | None = None,
        parts: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = PACKED_METHOD,
        made_by: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> None:
        if unknown := [name for name in fields if name not in _FIELDS]:
            raise ValueError(f"KbitConfig has no field {unknown[0]!r}; {suggest(unknown[0], _FIELDS)}")
        if quant_method != PACKED_METHOD:
            raise ValueError(f"quant_method={quant_method!r} is not {PACKED_METHOD!r}")
        if weight_dtype is not None and not isinstance(getattr(torch, weight_dtype, None), torch.dtype):
            raise ValueError(f"weight_dtype={weight_dtype!r} is no dtype of torch")
        self.quant_method = PACKED_METHOD  # type: ignore[assignment]  # transformers' own methods are an enumeration
        self.quant = _read_quant(fields)
        self.weight_dtype = weight_dtype
        self.parts = {name: dict(part) for name, part in (parts or {}).items()}
        self.made_by = dict(made_by or {})
        self.baseline: Baseline | None = None  # of kbit.load_model
        self.asked: KbitConfig | None = None  # of from_pretrained, where the checkpoint has this one
        self.quant.check_packable()

    @staticmethod
    def of(quant: QuantConfig, **more: Any) -> KbitConfig:
        """Return the configuration of a quantizer."""
        return KbitConfig(**{name: getattr(quant, name) for name in _FIELDS}, **more)

    @property
    def fields(self) -> dict[str, Any]:
        """The quantizer's fields that are not at their default, fit for JSON, and the bits and the data type."""
        plain: dict[str, Any] = json.loads(json.dumps(non_defaults(self.quant, QuantConfig())))
        return {"bits": self.quant.bits, "data_type": self.quant.data_type} | plain

    @property
    def fingerprint(self) -> str:
        """A hash of how the weights were packed. Weight files carry it, so that config.json cannot disagree."""
        content = json.dumps([self.fields, self.weight_dtype, self.parts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what transformers sets on the configuration of a checkpoint that is packed already."""
        return {"asked": self}

    def check_asked(self) -> None:
        """Raise ValueError if from_pretrained was asked for another quantizer than the checkpoint was packed with."""
        if self.asked is None:
            return
        stored, asked = self.quant, self.asked.quant
        found = [
            f"{name}={_find_value(stored, name)!r} in the checkpoint, {name}={_find_value(asked, name)!r} asked"
            for name in sorted(stored.identity_fields.keys() | asked.identity_fields.keys())
            if stored.identity_fields.get(name) != asked.identity_fields.get(name)
        ]
        if self.asked.weight_dtype not in (None, self.weight_dtype):
            found.append(f"weight_dtype={self.weight_dtype!r} in the checkpoint, {self.asked.weight_dtype!r} asked")
        if found:
            raise ValueError(
                f"the checkpoint is packed already, in another way than quantization_config asks: {'; '.join(found)}. "
                "Leave quantization_config out to load it as it is, or quantize the model that it was made of"
            )

    def find_layout(self, label: str, shape: tuple[int, ...], dtype: torch.dtype) -> PackedLayout:
        """Return the layout of a weight, by its name (NAME[3] for an expert), shape [.., out, in] and own dtype."""
        part = self.parts.get(label, {})
        return PackedLayout(
            self.quant.spec,
            shape,
            dtype if self.weight_dtype is None else getattr(torch, self.weight_dtype),
            int(part.get("outlier_columns", 0)),
            bool(part.get("input_scales", False)),
            getattr(torch, part["column_dtype"]) if "column_dtype" in part else None,
        )

    def note_layouts(self, layouts: Mapping[str, PackedLayout]) -> None:
        """Keep the dtype of the weights, and what single weights store beyond codes and scales."""
        self.parts = {}
        for label, layout in layouts.items():
            self.weight_dtype = self.weight_dtype or name_dtype(layout.dtype)
            part: dict[str, Any] = {"outlier_columns": layout.outlier_columns} if layout.outlier_columns else {}
            part |= {"input_scales": True} if layout.has_input_scales else {}
            part |= {"column_dtype": name_dtype(layout.column_dtype)} if layout.column_dtype else {}
            self.parts |= {label: part} if part else {}

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json has: the constructor's arguments."""
        others = {"weight_dtype": self.weight_dtype, "parts": self.parts, "made_by": self.made_by}
        return {
            "quant_method": PACKED_METHOD,
            **self.fields,
            **{name: value for name, value in others.items() if value},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: every field says how to read the weights."""
        return self.to_dict()


def _find_value(quant: QuantConfig, name: str) -> Any:
    return quant.identity_fields.get(name, getattr(quant, name, None))


def _read_quant(fields: Mapping[str, Any]) -> QuantConfig:
    values = dict(fields)
    for group, make in OPTION_GROUPS.items():
        if isinstance(values.get(group), Mapping):
            values[group] = make(**values[group])
    if values.get("table") is not None:
        values["table"] = tuple(values["table"])  # JSON has lists
    return QuantConfig(**values)


let_configurations_meet(KbitConfig)
