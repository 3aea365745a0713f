"""What is measured of a model: the fields of eval, their types and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kbit.checks import check_choice

NANO_TASKS: Final = ("nano_cloze", "nano_choice", "nano_swap", "nano_endings")


PERPLEXITY_KINDS: Final = ("windows", "rolling")  # see kbit.evaluation.perplexity


# A batch size counts sequences of this many tokens. On a CPU 32 of them (1,024 tokens) keep activations in its caches:
# eight times as many cost a third more time; a GPU wants many more at once.
TOKENS_PER_SEQUENCE: Final = {"cpu": 32, "cuda": 512}


@dataclass(frozen=True)
class FeatureConfig:
    """Emergent outlier features (kbit.evaluation.outlier_features), by the criteria of LLM.int8().

    Attributes:
        measure: whether they are looked for, on the windows of eval.perplexity.
        magnitude: from which on a hidden value is large.
        layers: least share of layers in which a feature is large, 0..1.
        positions: least share of positions at which it is, 0..1.
    """

    measure: bool = False
    magnitude: float = 6.0
    layers: float = 0.25
    positions: float = 0.06

    def __post_init__(self) -> None:
        if not self.magnitude > 0:
            raise ValueError(f"eval.features.magnitude={self.magnitude:g} is not > 0")
        for name in ("layers", "positions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"eval.features.{name}={getattr(self, name):g} is not in 0..1")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
        tasks: lm-eval task names, zero-shot.
        limit: only the first items of each task; None is all.
        batch_size: of a forward pass, as a budget: sequences of 32 tokens on a CPU (32: 1,024 tokens), of 512 on a
            GPU. What is measured does not depend on it beyond float rounding (log-likelihoods to 1e-4 in float32), so
            it is no part of the key.
        perplexity: a text to measure cross entropy on: embedded name, path, or hub text (wikitext2, c4, pile_cc); None
            is none.
        perplexity_kind: windows (fixed, per token: the papers' definition) or rolling (lm-eval's, per word).
        perplexity_windows: at most this many windows of the model's context (at most 2048 tokens); None is all. Rolling
            perplexity is always of the whole text.
        task_path: a folder with the user's own task YAMLs.
        features: whether and how emergent outlier features are looked for.
    """

    tasks: tuple[str, ...] = NANO_TASKS
    limit: int | None = None
    batch_size: int = 32
    perplexity: str | None = "nano_held_out"
    perplexity_kind: str = "windows"
    perplexity_windows: int | None = 256
    task_path: str | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))  # Hydra hands over a list
        for name in ("limit", "batch_size", "perplexity_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{name}={value} is not >= 1")
        check_choice("eval.perplexity_kind", self.perplexity_kind, PERPLEXITY_KINDS)
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)} names a task twice")
        if not self.tasks and self.perplexity is None:
            raise ValueError("nothing to measure: eval.tasks is empty and eval.perplexity is null")
        if self.features.measure and (self.perplexity is None or self.perplexity_kind != "windows"):
            raise ValueError("eval.features.measure needs a text: eval.perplexity, with eval.perplexity_kind=windows")
