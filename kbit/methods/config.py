"""How a model is quantized: the quantizer, the method and its options, and which weights or dimensions are left out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.checks import check_choice, non_defaults
from kbit.layers.int8_schemes import Scheme
from kbit.layers.run_time.transient import ActivationConfig as ActivationConfig
from kbit.layers.run_time.transient import CacheConfig as CacheConfig
from kbit.layers.run_time.transient import describe_role
from kbit.methods.allocation.config import AllocationConfig, describe_choice
from kbit.methods.options import METHODS as METHODS
from kbit.methods.options import RUN_TIME, check_run_time
from kbit.methods.options import CalibrationConfig as CalibrationConfig
from kbit.methods.options import GptqConfig as GptqConfig
from kbit.methods.options import Method as Method
from kbit.methods.selection.rules import PATTERN, Rule, check_rules, finds_any, list_changes, read_rules, write_rules
from kbit.numerics.spec import BASELINE_BITS, QuantSpec, find_preset, write_table

# The values that keys leave out: the first defaults. They stay as they are when a default changes, so that the results
# of every version are found.
KEY_BASE: Final = QuantSpec(data_type="float")
OUTLIER_SELECTIONS: Final = ("proxy", "column", "random")  # see kbit.methods.selection.outlier_columns


OPTION_GROUPS: Final[dict[str, Any]] = {  # fields of QuantConfig that are configurations of their own
    "calibration": CalibrationConfig,
    "gptq": GptqConfig,
    "allocation": AllocationConfig,
    "activations": ActivationConfig,
    "kv_cache": CacheConfig,
}
RULE_FIELDS: Final = (*(f.name for f in dataclasses.fields(QuantSpec)), "method")  # what quant.rules may change


@dataclass(frozen=True)
class QuantConfig(QuantSpec):
    """The quantizer and which tensors it applies to.

    Attributes:
        method: rtn (round to nearest), mse (scales searched for the least squared error), hqq (half-quadratic scales
            and offsets), awq (input channels scaled by their activations), gptq, or a method that multiplies int8 by
            int8 (absmax, zeropoint, rowwise, vectorwise, zeropoint_vectorwise, rowwise_decomposition, llm_int8,
            zeropoint_llm_int8). An int8 method needs bits=8 and decides the quantizer: data type, block size and
            scale format mean nothing to it.
        calibration: the text that awq and gptq see, and allocations by kl and fisher.
        gptq: options that only gptq has.
        outlier_fraction: share p of each matrix' input dimensions that stay at 16 bits, 0 <= p < 1, where 0 is none. It
            costs p (16 - bits) bits per parameter, and is rounded to the nearest count, at least one dimension.
        outlier_selection: rule that chooses them: proxy (the weights before have the largest standard deviation; paper,
            eq. 2), column (this matrix' own column has it), random (a control).
        outlier_zscore: number used instead of a fraction: the dimensions stay whose standard deviation is more than so
            many standard deviations above the matrix' mean one (bitsandbytes: 4).
        activation_threshold: magnitude for methods that decompose (llm_int8 and others): input dimensions in which an
            activation is larger are multiplied at 16 bits (LLM.int8(): 6.0).
        include: regular expression of tensor names to quantize in addition to the block matrices.
        exclude: regular expression of tensor names not to quantize.
        rules: other fields of the quantizer for some tensors, such as {match: lm_head, bits: 6}. The first rule whose
            regular expression finds a tensor's name applies to it. It changes fields of QuantSpec, or the method to one
            without data. bits=16 leaves the tensor as it is. A rule also quantizes embeddings and the head.
        allocation: a budget of bits to distribute over the tensors that no rule is for. quant.bits then means nothing,
            but to a rule without bits.
        activations: quantizer of the inputs of the quantized products, or if quant.bits is 16 of those that would be.
        kv_cache: quantizer of the keys and values that attention keeps of each token.
        rotation: hadamard quantizes weights, and activations if they are quantized, after a rotation of each product's
            inputs, which spreads outliers: random signs, then a Hadamard matrix. residual rotates the residual stream
            too, with the gains of norms in the matrices (Llama, Mistral, Qwen2, Qwen3). None is no rotation.
        rotation_seed: seed of the random signs.
        min_coverage: least share of the block matrices' parameters that must be quantized, 0..1.
    """

    method: str = "rtn"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    outlier_fraction: float = 0.0
    outlier_selection: str = "proxy"
    outlier_zscore: float | None = None
    activation_threshold: float = 6.0
    include: str | None = None
    exclude: str | None = None
    rules: tuple[dict[str, Any], ...] = ()
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    kv_cache: CacheConfig = field(default_factory=CacheConfig)
    rotation: str | None = None
    rotation_seed: int = 0
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quant.method", self.method, tuple(METHODS))
        if not self.signed:
            raise ValueError("quant.signed=false has no values below 0, and a model's weights have")
        self._check_outliers()
        self._check_method()
        self._check_rules()
        self.allocation.check_quantizer(self)
        check_run_time(self)
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"quant.min_coverage={self.min_coverage:g} is not in 0..1")
        for name, pattern in [("include", self.include), ("exclude", self.exclude)]:
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"quant.{name}={pattern!r} is not a regular expression: {error}") from None

    def _check_outliers(self) -> None:
        check_choice("quant.outlier_selection", self.outlier_selection, OUTLIER_SELECTIONS)
        if not 0 <= self.outlier_fraction < 1:
            raise ValueError(f"quant.outlier_fraction={self.outlier_fraction:g} is not in [0, 1)")
        if self.outlier_zscore is not None:
            if not 0 < self.outlier_zscore < math.inf:
                raise ValueError(
                    f"quant.outlier_zscore={self.outlier_zscore:g} is not a finite number > 0 (null: none)"
                )
            if self.outlier_fraction or self.outlier_selection == "random":
                raise ValueError(
                    "quant.outlier_zscore says by itself how many dimensions stay at 16 bits: it goes with neither "
                    "quant.outlier_fraction nor quant.outlier_selection=random"
                )
        if not 0 < self.activation_threshold < math.inf:
            raise ValueError(f"quant.activation_threshold={self.activation_threshold:g} is not a finite number > 0")

    def _check_method(self) -> None:
        if self.scheme is not None and self.bits not in (8, BASELINE_BITS):
            raise ValueError(f"quant.method={self.method} computes in 8 bits: quant.bits={self.bits} is not 8")
        if self.rounding == "stochastic" and self.traits.minimises_error:
            raise ValueError(f"quant.method={self.method} minimises an error, which rounding=stochastic would add to")
        if self.traits.options is not None:
            getattr(self, self.traits.options).check_quantizer(self)

    def _check_rules(self) -> None:
        """Check the rules, and keep them in a form that can be hashed."""
        object.__setattr__(self, "rules", read_rules(self.rules, RULE_FIELDS) if self.rules else ())
        check_rules(self)

    @staticmethod
    def from_name(name: str) -> QuantConfig:
        """Return the named quantizer of conf/quant, with its method. See QuantSpec.from_name."""
        fields = find_preset(name)
        groups = {group: make(**fields.pop(group)) for group, make in OPTION_GROUPS.items() if group in fields}
        return QuantConfig(**fields, **groups)

    @staticmethod
    def of(spec: QuantSpec) -> QuantConfig:
        """Return a bare quantizer as what to do with a model. A QuantConfig is returned as it is."""
        if isinstance(spec, QuantConfig):
            return spec
        return QuantConfig(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(QuantSpec)})

    def without_allocation(self, rules: Sequence[dict[str, Any]] = ()) -> QuantConfig:
        """Return the configuration with further rules in place of its allocation."""
        return dataclasses.replace(self, allocation=AllocationConfig(), rules=(*self.rules, *rules))

    def follow(self, number: int | None) -> QuantConfig:
        """Return the quantizer of the tensors that this rule is for, None of those without a rule."""
        changes = {} if number is None else list_changes(self.rules[number])
        return dataclasses.replace(self, rules=(), allocation=AllocationConfig(), **changes) if self.rules else self

    def find_rule(self, names: Sequence[str]) -> int | None:
        """Return the number of the first rule for the tensor with these names, or None."""
        return next((number for number, rule in enumerate(self.rules) if finds_any(rule, names)), None)

    @property
    def traits(self) -> Method:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def scheme(self) -> Scheme | None:
        """How the method multiplies in int8, or None."""
        return self.traits.scheme

    @property
    def allocates(self) -> bool:
        """Whether a budget of bits is to be distributed before anything is quantized."""
        return self.allocation.budget_bits is not None

    @property
    def sees_text(self) -> bool:
        """Whether a calibration text decides the quantized model."""
        return not self.is_baseline and (self.traits.needs_text or self.allocation.needs_text)

    @property
    def keeps_outliers(self) -> bool:
        """Whether input dimensions stay at 16 bits that are chosen before anything runs."""
        return not self.is_baseline and bool(self.outlier_fraction or self.outlier_zscore)

    @property
    def needs_whole_model(self) -> bool:
        """Whether a weight's codes depend on other weights or on a text, so that none can be packed by itself."""
        return self.traits.needs_text or self.keeps_outliers

    def check_packable(self) -> None:
        """Raise ValueError if the quantizer gives no k-bit codes to pack."""
        if self.is_baseline:
            raise ValueError(f"quant.bits={self.bits} quantizes nothing: there is nothing to pack")
        if self.run_time_fields or self.rotation is not None:
            raise ValueError(
                "a packed model computes with its inputs, keys and values as they are: it has no quant.activations, "
                "quant.kv_cache or quant.rotation"
            )
        if self.rules:
            raise ValueError("a packed model has one quantizer for all of its weights: it has no quant.rules")
        if self.allocates:
            raise ValueError("a packed model has one quantizer for all of its weights: it has no quant.allocation")
        if self.scheme is not None:
            raise ValueError(
                f"quant.method={self.method} multiplies int8 by int8 and keeps its 16-bit weights: it cannot be "
                "packed. Use quant=int8_rowwise for its codes"
            )

    @property
    def is_unchanged(self) -> bool:
        """Whether the model is the 16-bit one: its weights are, and so is what it computes with at run time."""
        return self.is_baseline and not self.run_time_fields

    @property
    def run_time_fields(self) -> dict[str, Any]:
        """What decides the rounding at run time, by group, canonical. A group at 16 bits is left out."""
        return {group: fields for group in RUN_TIME if (fields := getattr(self, group).identity_fields)}

    @property
    def run_time_words(self) -> dict[str, str]:
        """What is rounded at run time, in words, such as {"activations": "int8"}."""
        return {group: describe_role(getattr(self, group), fields) for group, fields in self.run_time_fields.items()}

    @property
    def decomposes(self) -> bool:
        """Whether input dimensions are multiplied at 16 bits that are found at run time."""
        return self.scheme is not None and self.scheme.decomposes

    @property
    def spec(self) -> QuantSpec:
        """The weights' quantizer alone."""
        if self.scheme is not None and not self.is_baseline:
            layout = "row" if self.scheme.weight_rows else "flat"
            return QuantSpec(bits=8, data_type="int", block_size=None, layout=layout, scale_format="fp32")
        return QuantSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QuantSpec)})

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the quantized model, canonical.

        Fields without effect and fields that equal KEY_BASE are left out, so a field that is added later does not
        change the keys of old results. The calibration text has the name that the user gave it, and
        kbit.experiments.identity puts its content in the name's place.
        """
        spec = self.spec.canonical()
        names: dict[str, Any] = {name: getattr(self, name) for name in ("include", "exclude") if getattr(self, name)}
        if spec.is_baseline:
            changes_products = not self.activations.is_baseline  # the inputs of which, include and exclude say
            others = names | self._rotation_fields if changes_products else {}
            return {"bits": BASELINE_BITS} | self.run_time_fields | others
        fields = non_defaults(spec, KEY_BASE) | {"bits": spec.bits}
        if spec.data_type == "quantile" and spec.normalization == "signed_absmax":
            fields["revision"] = 2  # the first one fitted its codebook to other values: its results are not these
        if self.rules:
            names["rules"] = [self._describe_rule(number) for number in range(len(self.rules))]
        if self.allocates:
            names["allocation"] = self.allocation.identify(self)
            for name in ("bits", "exponent_bits", "float_bias"):  # which the choices say, each for its bits
                fields.pop(name, None)
        others = names | self._outlier_fields() | self._rotation_fields | self.run_time_fields
        return fields | {"method": self.method} | self.method_options | others

    def _describe_rule(self, number: int) -> dict[str, Any]:
        """Return a rule with what it changes, canonical."""
        rule = self.rules[number]
        if self.allocates:  # no other tensor has the usual quantizer, so that a rule is told whole
            return {PATTERN: rule[PATTERN], **describe_choice(self, Rule(list_changes(rule)))}
        changed, usual = self.follow(number), self.follow(None)
        changes = non_defaults(changed.spec.canonical(), usual.spec.canonical())
        changes |= {} if changed.is_baseline or changed.method == usual.method else {"method": changed.method}
        return {PATTERN: rule[PATTERN], **dict(sorted(changes.items()))}

    @property
    def idle_fields(self) -> set[str]:
        """The fields that are set and change nothing beside the others, such as exponent_bits of nf."""
        canonical = self.spec.canonical()
        changed = non_defaults(self, QuantConfig()).keys() - {"bits", "min_coverage"}
        # exponent_bits=3 has its effect, though it is what a float of 4 bits has anyway
        return {name for name in changed if getattr(canonical, name, None) != getattr(self, name) and self._idles(name)}

    def _idles(self, name: str) -> bool:
        try:
            without = dataclasses.replace(self, **{name: getattr(QuantConfig(), name)})
        except ValueError:  # the other fields need it
            return False
        return without.identity_fields == self.identity_fields

    @property
    def method_options(self) -> dict[str, Any]:
        """The options that mean something to the method, canonical; empty for a method without any."""
        options: dict[str, Any] = {"calibration": self.calibration.identity_fields} if self.sees_text else {}
        if (group := self.traits.options) and (own := non_defaults(getattr(self, group), OPTION_GROUPS[group]())):
            options[group] = own
        return options

    @property
    def label_details(self) -> dict[str, Any]:
        """The fields that the label leaves out and that are not at their default: layout, gptq.act_order and so on.

        The calibration text is given by the name that the user gave it.
        """
        told: tuple[str, ...] = ("bits", "data_type", "exponent_bits", "block_size", "method", "calibration", "gptq")
        told += ("outlier_fraction", "outlier_selection", "outlier_zscore", "revision")
        if self.scheme is not None:  # which decides the quantizer
            told += tuple(f.name for f in dataclasses.fields(QuantSpec))
        others = {name: value for name, value in self.identity_fields.items() if name not in told}
        if "table" in others:
            others["table"] = write_table(others["table"])
        if "rules" in others:
            others["rules"] = f"({write_rules(self.rules)})"
        if "allocation" in others:
            others["allocation"] = f"({self.allocation.label()})"
        if self.sees_text:
            others |= _with_prefix("calibration", non_defaults(self.calibration, CalibrationConfig()))
        return others | self.run_time_words | _with_prefix("gptq", self.identity_fields.get("gptq", {}))

    @property
    def rotation_words(self) -> str | None:
        """The rotation in words, such as "hadamard seed 1", or None of a model that has none, or nothing to rotate."""
        is_idle = self.is_baseline and self.activations.is_baseline
        return None if is_idle else " seed ".join(map(str, self._rotation_fields.values())) or None

    @property
    def _rotation_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {} if self.rotation is None else {"rotation": self.rotation}
        return fields | ({"rotation_seed": self.rotation_seed} if fields and self.rotation_seed else {})

    def _outlier_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.keeps_outliers:
            names = ("outlier_fraction", "outlier_zscore")
            fields |= {name: getattr(self, name) for name in names if getattr(self, name)}
            fields |= {"outlier_selection": self.outlier_selection} if self.outlier_selection != "proxy" else {}
            fields |= {"seed": self.seed} if self.outlier_selection == "random" and self.seed else {}
        if self.decomposes and self.activation_threshold != QuantConfig.activation_threshold:
            fields |= {"activation_threshold": self.activation_threshold}
        return fields

    def count_bits(self, shape: Sequence[int], kept: int | None = None) -> int:
        """Return the bits of a matrix [..., out, in] of this shape, its input dimensions at 16 bits included.

        The bits are those of codes, scales, zero points of int8 methods and AWQ's scale of each input. A kept dimension
        costs 16 - bits for each of its weights. It has its share in the blocks' scales as if it were quantized, and the
        paper's p (16 - bits) does not count the indices of the dimensions (16 / out bits for each kept weight). What is
        decomposed at run time is not counted.

        Args:
            shape: shape of the matrix, input dimensions last.
            kept: number of input dimensions that are kept. None is as many as outlier_fraction says, and none for
                outlier_zscore, since only the weights' values tell.
        """
        spec, elements = self.spec, math.prod(shape)
        if spec.is_baseline or elements == 0:
            return spec.count_bits(shape)
        kept = self.count_kept(shape[-1]) if kept is None else kept
        kept_bits = elements // shape[-1] * kept * (BASELINE_BITS - self.bits)
        return spec.count_bits(shape) + self.traits.count_extra_bits(shape) + kept_bits

    def count_kept(self, inputs: int) -> int:
        """Return how many of so many input dimensions outlier_fraction keeps at 16 bits."""
        return max(1, math.floor(self.outlier_fraction * inputs + 0.5)) if self.outlier_fraction else 0

    def label(self) -> str:
        """Return the short name of a bare quantizer, or the int8 method's, and what of outliers is kept."""
        name = self.method if self.scheme is not None and not self.is_baseline else super().label()
        name = self.data_type if self.allocates else name
        if not self.keeps_outliers:
            return name
        share = f"{self.outlier_fraction:.3g}" if self.outlier_fraction else f"z > {self.outlier_zscore:g}"
        return f"{name} {self.outlier_selection} outliers {share}"


def _with_prefix(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in values.items()}


def find_idle_fields(quantizers: Iterable[QuantConfig]) -> dict[str, QuantConfig]:
    """Return the fields that change nothing in any of these quantizers, each with a quantizer that sets it."""
    quantized = [quant for quant in dict.fromkeys(quantizers) if not quant.is_baseline]
    idle = quantized[0].idle_fields if quantized else set()
    for quant in quantized[1:]:
        idle = idle and idle & quant.idle_fields
    return dict.fromkeys(sorted(idle), quantized[0]) if idle else {}
