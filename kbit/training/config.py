"""How a model is trained before, or after, it is quantized: the fields of train, their types and their checks.

Eight roles say what is quantized meanwhile. Each role is a QuantSpec, and 16 bits stand for "not quantized":

    weights, activations, gradients       what enters the products of linear layers
    momentum, variance                    what the optimizer keeps of each parameter
    exchange                              gradients, before they are averaged over replicas
    stage_activations, stage_gradients    what a pipeline's stages send forward, and back
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from kbit.checks import check_choice, non_defaults
from kbit.layers.run_time.transient import check_transient, describe_role
from kbit.numerics.spec import BASELINE_BITS, QuantSpec, check_state
from kbit.training.sections import FastConfig, LoraConfig

STARTS: Final = ("checkpoint", "random")
DTYPES: Final = ("float32", "bfloat16")
OPTIMIZER_STATES: Final[dict[str, tuple[str, ...]]] = {
    "adamw": ("momentum", "variance"),
    "adam": ("momentum", "variance"),
    "sgd": ("momentum",),
    "lion": ("momentum",),
}  # the roles of what each optimizer keeps
PRODUCTS: Final = ("weights", "activations", "gradients")
STATES: Final = ("momentum", "variance")
STAGES: Final = ("stage_activations", "stage_gradients")
SENT: Final = ("exchange", *STAGES)
ROLES: Final = (*PRODUCTS, *STATES, *SENT)
EXCHANGE_FORMS: Final = ("all_gather", "two_shot")  # see kbit.training.exchange.replicas
MAX_STEPS: Final = 1_000_000  # steps of one training, so that no other seed's batches have the same seeds
MAX_SEED: Final = 2**32 // MAX_STEPS - 1  # torch's CPU generator reads the lower 32 bits of a seed
# The values that keys leave out in a role. They stay as they are when a default changes.
_ROLE_BASE: Final = QuantSpec(data_type="float")


def _make_role(**fields: Any) -> QuantSpec:
    return QuantSpec(bits=BASELINE_BITS, **fields)


def _make_operand() -> QuantSpec:
    """Return what activations and gradients have at 16 bits: blocks within a sum, and scales of any size."""
    return _make_role(layout="row", scale_format="fp32")


def _make_state(**fields: Any) -> QuantSpec:
    """Return what the 8-bit optimizers of Dettmers et al. 2022 have, at 16 bits: dynamic, block 256, float32 scales."""
    return _make_role(data_type="dynamic", block_size=256, scale_format="fp32", **fields)


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained. Without adapters this is done before it is quantized, and with them afterwards.

    Attributes:
        steps: number of optimizer steps. 0 is no training, and no other key of train has an effect then.
        start: what is trained: the model's checkpoint, or random weights of its architecture.
        text: the text to train on: an embedded text, a path, or a text of the hub. See eval.perplexity.
        batch_size: number of windows in a step.
        context: tokens of a window. None is the model's context, at most 2048. Setting that number gives another key.
        lr: the highest learning rate.
        warm_up: share of the steps in which the learning rate rises linearly to lr. A cosine then lets it fall.
        last_lr: share of lr at which the cosine ends.
        optimizer: adamw, adam, sgd (with momentum) or lion.
        beta1: decay of the momentum at each step.
        beta2: decay of the variance at each step. Lion keeps so much of its momentum.
        eps: number added to the square root of the variance.
        weight_decay: decay of matrices. Vectors have none.
        clip: largest norm of all gradients together. A larger one is scaled down to it. None does not limit it.
        seed: seed of random weights, of the batches and of the adapters.
        dtype: the dtype that products are computed in. Weights and losses are float32 in each case.
        min_size: states of parameters with fewer elements have 32 bits.
        stable_embedding: whether a layer norm follows the token embedding, and its states have 32 bits.
        embedding_states: 32 keeps the embeddings' states at 32 bits. k lets them have those of other parameters.
        include: regular expression of the linear layers whose products are quantized. None is each of the blocks.
        replicas: number of parts of a batch whose gradients are averaged, as processes would do.
        error_feedback: whether what the exchange's rounding lost is added to the next step's gradients.
        exchange_form: how replicas exchange gradients. all_gather sends each gradient to all. With two_shot parts go to
            owners, whose means go to all: fewer bytes from 3 replicas on, and a second rounding.
        stages: number of pipeline stages, with nearly equal numbers of decoder layers. Without a quantizer of
            stage_activations or stage_gradients it changes nothing.
        checkpoint_every: number of steps after which a local store keeps the training, to go on from.
        weights: quantizer of the weights in products. With it alone this is quantization-aware training (QAT).
        activations: quantizer of what enters a linear layer.
        gradients: quantizer of the gradients that enter the two products of the backward pass.
        momentum: quantizer of the optimizer's first moment, which sgd calls its momentum buffer. Its scales are
            float32, also where a named quantizer has fp16.
        variance: quantizer of the optimizer's second moment, with float32 scales as well.
        exchange: quantizer of the gradients that replicas exchange.
        stage_activations: quantizer of the activations that one pipeline stage sends to the next.
        stage_gradients: quantizer of the gradients of these activations, which are sent back.
        lora: adapters that are trained in place of the weights.
        fast: FAST's rule of changing precision.
    """

    steps: int = 0
    start: str = "checkpoint"
    text: str = "nano_train"
    batch_size: int = 8
    context: int | None = None
    lr: float = 4e-4
    warm_up: float = 0.05
    last_lr: float = 0.1
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 0
    dtype: str = "float32"
    min_size: int = 4096
    stable_embedding: bool = False
    embedding_states: str = "k"
    include: str | None = None
    replicas: int = 1
    error_feedback: bool = False
    exchange_form: str = "all_gather"
    stages: int = 1
    checkpoint_every: int = 50
    weights: QuantSpec = field(default_factory=_make_role)
    activations: QuantSpec = field(default_factory=_make_operand)
    gradients: QuantSpec = field(default_factory=_make_operand)
    momentum: QuantSpec = field(default_factory=_make_state)
    variance: QuantSpec = field(default_factory=lambda: _make_state(signed=False, zero=False))
    exchange: QuantSpec = field(default_factory=_make_state)
    stage_activations: QuantSpec = field(default_factory=_make_state)
    stage_gradients: QuantSpec = field(default_factory=_make_state)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fast: FastConfig = field(default_factory=FastConfig)

    def __post_init__(self) -> None:
        for name, allowed in (("start", STARTS), ("dtype", DTYPES), ("optimizer", tuple(OPTIMIZER_STATES))):
            check_choice(f"train.{name}", getattr(self, name), allowed)
        check_choice("train.embedding_states", self.embedding_states, ("k", "32"))
        check_choice("train.exchange_form", self.exchange_form, EXCHANGE_FORMS)
        self._check_numbers()
        if self.steps:
            self._check_roles()

    def _check_numbers(self) -> None:
        _check_range("steps", self.steps, 0, MAX_STEPS)
        _check_range("seed", self.seed, 0, MAX_SEED)
        for name in ("batch_size", "context", "replicas", "stages", "checkpoint_every", "min_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name}={value} is not >= 1")
        for name in ("lr", "eps", "clip"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"train.{name}={value:g} is not a finite number > 0")
        for name in ("warm_up", "last_lr"):
            _check_range(name, getattr(self, name), 0, 1)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name):g} is not in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"train.weight_decay={self.weight_decay:g} is not a finite number >= 0")
        if self.batch_size % self.replicas:
            raise ValueError(f"train.batch_size={self.batch_size} is not a multiple of train.replicas={self.replicas}")
        try:
            re.compile(self.include or "")
        except re.error as error:
            raise ValueError(f"train.include={self.include!r} is not a regular expression: {error}") from None

    def _check_roles(self) -> None:
        """Raise ValueError if a role is of something that this training does not have."""
        for name in STATES:
            if self.quantizes(name) and name not in OPTIMIZER_STATES[self.optimizer]:
                raise ValueError(
                    f"train.optimizer={self.optimizer} keeps no {name}, so that train.{name}.bits="
                    f"{getattr(self, name).bits} means nothing; it keeps {', '.join(OPTIMIZER_STATES[self.optimizer])}"
                )
        for name in ROLES:
            if name != "variance" and self.quantizes(name) and not getattr(self, name).signed:
                raise ValueError(f"train.{name}.signed=false has no values below 0, and {name} have both signs")
        if self.is_aware and self.weights.rounding == "stochastic":
            raise ValueError("train.weights.rounding=stochastic would round with the same random numbers at each step")
        self._check_quantizers()
        if self.stable_embedding and self.start != "random":
            raise ValueError(
                f"train.stable_embedding=true puts a layer norm into the model, which train.start={self.start} was "
                "trained without: use train.start=random"
            )
        if self.lora.rank and (self.start == "random" or self.quantizes("weights") or self.fast.adapt):
            raise ValueError(
                f"train.lora.rank={self.lora.rank} trains adapters beside a frozen base: it goes neither with "
                "train.start=random, nor with train.weights, nor with train.fast; quant quantizes the base"
            )

    def _check_quantizers(self) -> None:
        """Raise ValueError if a state or operand has a quantizer that it cannot have, or if nothing would be sent."""
        for name in STATES:
            if (state := self.find_state(name)) is not None:
                try:
                    check_state(name, state)
                except ValueError as error:
                    raise ValueError(f"train.{error}") from None
        for name in ("activations", "gradients", *SENT):
            if self.quantizes(name) and (name in SENT or not self.fast.adapt):
                try:
                    check_transient(name, getattr(self, name), is_gradient="activations" not in name)
                except ValueError as error:
                    raise ValueError(f"train.{error}") from None
        if self.quantizes("exchange") and self.replicas == 1:
            raise ValueError(
                f"train.exchange.bits={self.exchange.bits} is of gradients that replicas exchange, and "
                "train.replicas=1 exchanges none: raise train.replicas"
            )
        if (quantized := [name for name in STAGES if self.quantizes(name)]) and self.stages == 1:
            raise ValueError(
                f"train.{quantized[0]}.bits={getattr(self, quantized[0]).bits} is of what pipeline stages send each "
                "other, and train.stages=1 sends nothing: raise train.stages"
            )

    def quantizes(self, role: str) -> bool:
        """Whether a role is quantized."""
        spec: QuantSpec = getattr(self, role)
        return not spec.is_baseline

    def find_state(self, role: str) -> QuantSpec | None:
        """Return the quantizer of an optimizer's state, or None if the role is not quantized or no state.

        Its scales are float32, as those of all 8-bit optimizers: float16 could not hold the squares of small gradients.
        """
        spec: QuantSpec = getattr(self, role)
        if role not in STATES or spec.is_baseline:
            return None
        return dataclasses.replace(spec, scale_format="fp32") if spec.scale_format == "fp16" else spec

    @property
    def is_aware(self) -> bool:
        """Whether this is quantization-aware training: weights are rounded in products, and nothing else there is."""
        return bool(self.steps) and self.quantizes("weights") and not self.quantizes_products

    @property
    def quantizes_products(self) -> bool:
        """Whether products have quantized operands in another way than QAT, which rounds weights alone."""
        return bool(self.steps) and (self.fast.adapt or self.quantizes("activations") or self.quantizes("gradients"))

    @property
    def sends_between_stages(self) -> bool:
        """Whether pipeline stages send each other something quantized."""
        return bool(self.steps) and any(self.quantizes(name) for name in STAGES)

    @property
    def is_from_scratch(self) -> bool:
        """Whether random weights are trained."""
        return bool(self.steps) and self.start == "random"

    @property
    def tokens(self) -> int | None:
        """The number of tokens that are trained on, or None if the model's context decides it."""
        return None if self.context is None else self.steps * self.batch_size * self.context

    @property
    def identity_fields(self) -> dict[str, Any]:
        """The fields that decide the trained model, canonical. Without steps there are none.

        Fields without effect and fields at their default are left out. The text has the name that the user gave it, and
        kbit.experiments.identity puts its content in the name's place.
        """
        if not self.steps:
            return {}
        plain = {name: value for name, value in non_defaults(self, TrainConfig()).items() if not _is_nested(name)}
        fields = {name: value for name, value in plain.items() if name not in self._idle_names()}
        fields |= {"steps": self.steps, "text": self.text}
        for role in ROLES:
            if self.quantizes(role) and role not in self._idle_names():
                spec: QuantSpec = (self.find_state(role) or getattr(self, role)).canonical()
                fields[role] = non_defaults(spec, _ROLE_BASE) | {"bits": spec.bits}
        if self.lora.rank:
            fields["lora"] = non_defaults(self.lora, LoraConfig())
        if self.fast.adapt:
            fields["fast"] = non_defaults(self.fast, FastConfig())
        return fields

    def _idle_names(self) -> set[str]:
        """Return the names of fields and roles that change nothing beside the others."""
        names = {"checkpoint_every"}
        if self.optimizer == "adam" and not self.weight_decay:
            names |= {"optimizer"}  # which differs from adamw by how weights decay alone
        if "variance" not in OPTIMIZER_STATES[self.optimizer]:
            names |= {"eps"} | ({"beta2"} if self.optimizer == "sgd" else set())
        if not any(self.quantizes(name) for name in STATES):
            names |= {"min_size", "embedding_states"}
        if self.fast.adapt:
            names |= set(PRODUCTS)
        elif not any(self.quantizes(name) for name in PRODUCTS):
            names |= {"include"}
        if self.replicas == 1:
            names |= {"exchange", "error_feedback", "exchange_form"}
        if not self.quantizes("exchange"):
            names |= {"error_feedback"}
        if not self.sends_between_stages:
            names |= {"stages", *STAGES}
        return names

    @property
    def set_fields(self) -> dict[str, bool]:
        """The keys below train that are not at their default, such as weights.bits, and whether each has an effect."""
        default, idle = TrainConfig(), self._idle_names() - {"checkpoint_every"}
        idle |= {role for role in ROLES if not self.quantizes(role)}
        idle |= (set() if self.lora.rank else {"lora"}) | (set() if self.fast.adapt else {"fast"})
        effects: dict[str, bool] = {}
        for name in non_defaults(self, default):
            parts = non_defaults(getattr(self, name), getattr(default, name)) if _is_nested(name) else ()
            keys = [f"{name}.{part}" for part in parts] or [name]
            effects |= dict.fromkeys(keys, self.steps > 0 and name not in idle)
        return effects

    def label(self) -> str:
        """Return a short description for people, such as 'trained 300 steps weights=nf3', or "" without training."""
        if not self.steps:
            return ""
        fields = self.identity_fields
        parts = [f"trained {fields.pop('steps')} steps"]
        if fields.pop("text") != TrainConfig.text:
            parts.append(f"text={self.text}")
        for name, value in fields.items():
            if name in ROLES:
                spec = self.find_state(name) or getattr(self, name)
                others = non_defaults(spec.canonical(), getattr(TrainConfig(), name))
                parts.append(f"{name}={describe_role(spec, others)}")
            elif isinstance(value, dict):
                parts += [f"{name}.{inner}={own}" for inner, own in value.items()]
            else:
                parts.append(f"{name}={value}")
        return " ".join(parts)


def _is_nested(name: str) -> bool:
    return name in (*ROLES, "lora", "fast")


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"train.{name}={value:g} is not in {least:g}..{most:g}")


def find_idle_keys(configs: Iterable[TrainConfig]) -> list[str]:
    """Return the keys that are set and change nothing in any of these trainings, such as weights.bits."""
    effects: dict[str, bool] = {}
    for config in dict.fromkeys(configs):
        for name, counts in config.set_fields.items():
            effects[name] = effects.get(name, False) or counts
    return sorted(name for name, counts in effects.items() if not counts)


def list_texts(configs: Iterable[TrainConfig]) -> list[str]:
    """Return the text of each training, once."""
    return list(dict.fromkeys(config.text for config in configs if config.steps))
