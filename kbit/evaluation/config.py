"""What is measured: the fields of eval, their types and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from kbit.checks import check_choice

NANO_TASKS: Final = ("nano_cloze", "nano_choice", "nano_swap", "nano_endings")
PERPLEXITY_KINDS: Final = ("windows", "rolling")  # see kbit.evaluation.perplexity
# A batch size counts sequences of this many tokens. On a CPU, 32 sequences (1,024 tokens) keep activations in its
# caches, and eight times as many cost a third more time. A GPU wants many more tokens at once.
TOKENS_PER_SEQUENCE: Final = {"cpu": 32, "cuda": 512}


@dataclass(frozen=True)
class FeatureConfig:
    """Emergent outlier features (kbit.evaluation.outlier_features), by the criteria of LLM.int8().

    Attributes:
        measure: whether kbit looks for features, on the windows of eval.perplexity.
        magnitude: the least magnitude of a large hidden value.
        layers: the least share of layers in which a feature is large, 0..1.
        positions: the least share of positions at which a feature is large, 0..1.
    """

    measure: bool = False
    magnitude: float = 6.0
    layers: float = 0.25
    positions: float = 0.06

    def __post_init__(self) -> None:
        if not 0 < self.magnitude < math.inf:
            raise ValueError(f"eval.features.magnitude={self.magnitude:g} is not a finite number > 0")
        for name in ("layers", "positions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"eval.features.{name}={getattr(self, name):g} is not in 0..1")


@dataclass(frozen=True)
class SpeedConfig:
    """Time and memory (kbit.evaluation.speed): how fast the model generates, and what that takes.

    Attributes:
        measure: whether time and memory are measured. The settings are then part of the key, and so is packed.
        batches: the numbers of sequences that are generated at once, each of which is measured.
        prompt: the tokens of each sequence that go through the model at once before the first step.
        new: the steps after that, with one token for each sequence.
        repetitions: how often each batch is measured, in turns with the others. Fewer than 6 give no interval.
    """

    measure: bool = False
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new: int = 32
    repetitions: int = 7

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))  # Hydra hands over a list
        for name in ("prompt", "new", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.speed.{name}={getattr(self, name)} is not >= 1")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise ValueError(f"eval.speed.batches={list(self.batches)} are not one or several different numbers >= 1")

    def check_context(self, context: int | None) -> None:
        """Raise ValueError if prompt and steps are longer than a model's context, where that is known."""
        if context is not None and self.prompt + self.new > context:
            raise ValueError(
                f"eval.speed.prompt={self.prompt} and eval.speed.new={self.new} are more tokens than the model's "
                f"context of {context}"
            )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
        tasks: names of lm-eval tasks, groups of tasks or tags.
        limit: the number of items of each task, counted from its first item. None takes all items.
        batch_size: the budget of a forward pass, in sequences of 32 tokens on a CPU (32: 1,024 tokens) and of 512
            tokens on a GPU. Measured values depend on it by float rounding only (log-likelihoods to 1e-4 in float32),
            so the batch size is no part of the key.
        perplexity: the text to measure cross entropy on: an embedded text's name, a path, or a text of the hub
            (wikitext2, c4, pile_cc). None measures no text.
        perplexity_kind: windows (fixed windows, per token: the papers' definition) or rolling (lm-eval's, per word).
        perplexity_windows: the largest number of windows, each as long as the model's context (at most 2048 tokens).
            None takes all windows. Rolling perplexity always takes the whole text.
        task_path: a folder with the user's own task YAMLs.
        features: whether and how kbit looks for emergent outlier features.
        speed: whether and how kbit measures time and memory.
        measures: the user's own measures, each as "my.module:Name" or "my_measure.py:Name" (kbit.evaluation.measure).
        num_fewshot: the number of examples before each question of a task. None asks as the task says, else without.
        apply_chat_template: whether prompts go through the chat template of the model's tokenizer, as in lm-eval.
    """

    tasks: tuple[str, ...] = NANO_TASKS
    limit: int | None = None
    batch_size: int = 32
    perplexity: str | None = "nano_held_out"
    perplexity_kind: str = "windows"
    perplexity_windows: int | None = 256
    task_path: str | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    measures: tuple[str, ...] = ()
    num_fewshot: int | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))  # Hydra hands over a list
        object.__setattr__(self, "measures", tuple(self.measures))
        for name in ("limit", "batch_size", "perplexity_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{name}={value} is not >= 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"eval.num_fewshot={self.num_fewshot} is not >= 0")
        check_choice("eval.perplexity_kind", self.perplexity_kind, PERPLEXITY_KINDS)
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"eval.tasks={list(self.tasks)} names a task twice")
        if wrong := [name for name in self.measures if not all(name.rpartition(":"))]:
            raise ValueError(f"eval.measures={wrong[0]!r} is neither my.module:Name nor my_measure.py:Name")
        if not self.tasks and self.perplexity is None and not self.measures and not self.speed.measure:
            raise ValueError("nothing to measure: eval.tasks is empty and eval.perplexity is null")
        if self.features.measure and (self.perplexity is None or self.perplexity_kind != "windows"):
            raise ValueError("eval.features.measure needs a text: eval.perplexity, with eval.perplexity_kind=windows")
