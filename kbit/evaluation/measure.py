"""What a measure is: it looks at a model before and after quantization, and returns numbers with their items.

A measure of one's own takes a class with a name and one method:

    class Repetition(Measure):
        name = "repetition"

        def run(self, subject: Subject) -> Measured:
            shares = [...]  # one number for each window of subject.make_windows()
            numbers = [measure_mean("repetition", "share", shares)]
            return Measured(numbers, [encode_items("repetition", "share", shares)])

`kbit run eval.measures=[repetition.py:Repetition]` runs it and stores its numbers (see kbit.evaluation.measures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from kbit.data.windows import Windows, make_windows
from kbit.evaluation.config import EvalConfig
from kbit.evaluation.measurement import ItemValues, Measurement
from kbit.evaluation.rounds.sample import WHOLE, Sample, SampledPart
from kbit.models.architectures import check_ids
from kbit.models.config import MAX_WINDOW

if TYPE_CHECKING:
    from kbit.evaluation.scorer import Scorer

T = TypeVar("T")


class Memory:
    """What measures keep for later: one object of each kind."""

    def __init__(self) -> None:
        self._kept: dict[type, Any] = {}

    def recall(self, kind: type[T]) -> T:
        """Return the kept object of a class. The first call makes it, without arguments."""
        if kind not in self._kept:
            self._kept[kind] = kind()
        kept: T = self._kept[kind]
        return kept


class KeptWindows(dict[tuple[str, str, int | None], Windows]):
    """The windows of the texts measured so far, by (text, what identifies its content, largest number of windows)."""


class ContentNames(Protocol):
    """Names data by its content, as an experiment's key does (kbit.experiments.identity)."""

    def name_content(self, name: str, sha256: str) -> str:
        """Return what identifies the text of this name if its content has this hash."""
        ...

    def identify_tasks(self, names: Sequence[str], task_path: str | None) -> list[str]:
        """Return what identifies these tasks."""
        ...


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and what the experiment asks for.

    Attributes:
        model: a causal language model. Its weights have 16 bits in prepare() and are quantized in run().
        tokenizer: the model's tokenizer.
        scorer: lm-eval's interface to the model. It holds the budget of tokens of a forward pass.
        config: the fields of eval.
        identity: what of config is part of the experiment's key, with data named by its content.
        names: names data by its content.
        quantized: names of the parameters that are quantized between prepare() and run().
        memory: what measures keep as long as the model is loaded.
        lasting: what measures keep from one model to the next.
        sees_original: whether prepare() sees the 16-bit model. A packed model is quantized from the beginning, and what
            compares it with the 16-bit model is left out.
        load_seconds: how long the model took to load, and to be packed meanwhile. None: it was loaded before.
        counted_bits: the bits of the whole model as kbit counts them. None before it is quantized.
        sample: which items and windows are measured. Measures that know of no rounds see WHOLE alone.
    """

    model: Any
    tokenizer: Any
    scorer: Scorer
    config: EvalConfig
    identity: Mapping[str, Any]
    names: ContentNames
    quantized: frozenset[str] = frozenset()
    memory: Memory = field(default_factory=Memory)
    lasting: Memory = field(default_factory=Memory)
    sees_original: bool = True
    load_seconds: float | None = None
    counted_bits: int | None = None
    sample: Sample = WHOLE

    def make_windows(self) -> Windows:
        """Return the windows of eval.perplexity, which are made once for all variants of the model.

        Raises:
            ValueError: eval asks for no windows, or the text is shorter than one or was changed while it was read.
            FileNotFoundError: see kbit.data.windows.make_windows.
        """
        text, most = self.config.perplexity, self.config.perplexity_windows
        if text is None or self.config.perplexity_kind != "windows":
            raise ValueError("a measure of windows needs a text: eval.perplexity, with eval.perplexity_kind=windows")
        kept, wanted = self.memory.recall(KeptWindows), (text, self.identity["perplexity"], most)
        if wanted not in kept:
            context = min(MAX_WINDOW, int(self.scorer.max_length))
            windows = make_windows(text, self.tokenizer, context=context, max_windows=most)
            check_ids(self.model, self.tokenizer, int(windows.tokens.max()))
            check_read(text, self.names.name_content(text, windows.sha256), self.identity["perplexity"])
            kept[wanted] = windows
        return kept[wanted]


@dataclass(frozen=True)
class Measured:
    """What a measure returns.

    Attributes:
        measurements: every measured number.
        items: the values that these numbers were computed from, item by item, for paired comparisons of two variants.
        tokens: the number of tokens that the model was sent.
        records: fields of kbit.experiments.result.Result, for kbit's own measures.
        notes: free remarks for the result, as plain values that JSON can hold.
        sampled: how far the items were measured, if not all were (Subject.sample).
    """

    measurements: Sequence[Measurement] = ()
    items: Sequence[ItemValues] = ()
    tokens: int = 0
    records: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    sampled: tuple[SampledPart, ...] = ()


@runtime_checkable
class Measure(Protocol):
    """A way to measure a model. A subclass inherits all but its name and run().

    What a measure keeps between experiments belongs into the subject's memory.

    Attributes:
        name: how results call it. The task of each measurement of one's own measure is the name, or name/anything.
        fields: names of the fields of eval that decide its numbers. Those of kbit's measures are part of the key.
    """

    name: str
    fields: tuple[str, ...] = ()

    def prepare(self, subject: Subject) -> None:
        """Look at the 16-bit model, such as to compute what its variants are compared with."""
        return None  # said, as without a body the method would be abstract

    def run(self, subject: Subject) -> Measured:
        """Measure the model as it is now. A measure that eval does not ask for returns Measured().

        Raises:
            NonFiniteError: the model gave NaN or Inf, which is no measurement.
        """
        ...


def check_read(what: str, found: object, expected: object) -> None:
    """Raise ValueError if what was read is not what the experiment's key was computed from."""
    if found != expected:
        raise ValueError(f"{what} was changed while it was read: {found}, where the experiment asks for {expected}")
