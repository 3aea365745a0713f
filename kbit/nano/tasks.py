"""Builds the four nano tasks from four held-out children's books.

The paper scores models on LAMBADA, PIQA, WinoGrande and HellaSwag. Models of 0.1 to 7 million
block parameters are near chance there, so accuracy says nothing about their precision. The nano
tasks have the same four formats and draw on the text the nano models were trained to predict:

    nano_cloze    LAMBADA     the last word of a passage, which the passage has earlier too
    nano_choice   PIQA        the next sentence of the book against a sentence from elsewhere in it
    nano_swap     WinoGrande  one word of a passage against another, by the score of the text after it
    nano_endings  HellaSwag   the rest of a sentence against the rests of three other sentences

Every passage is a slice of a book that starts where a sentence starts. No model takes part: an item
is kept or dropped by its text alone. There is no random state either. Wherever a rule says "drawn",
the candidates are ordered by the SHA-256 of their text, so the files depend on the books alone and
are the same on every platform and version. Sizes are in characters. The nano tokenizer has about
2.7 characters a token on these books.

    python -m kbit.nano.tasks --books DIR --out DIR

reads DIR/236.txt, 289.txt, 55.txt and 902.txt and writes a nano_<task>.jsonl.xz for each task. The
books are named by their Project Gutenberg numbers. They are plain text with one paragraph a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

BOOKS = ("236", "289", "55", "902")  # The Jungle Book, The Wind in the Willows, The Wizard of Oz, The Happy Prince
ITEMS = 700  # at most, in a task: at accuracy 1/2 the Wilson 95% interval is then 3.7 points to either side
FAR = 20  # sentences between a true text and the place in the book its distractor comes from, about 1,900 characters
LENGTH_SLACK = 0.1  # a distractor's length differs by at most 10% from the true text's

Item = dict[str, object]
T = TypeVar("T")

_SENTENCE_END = re.compile(r"""[.!?]["')]*(?=[ \n])""")
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|[A-Z])\.$")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_CLAUSE_FINAL = re.compile(r"""(?<= )[A-Za-z]{3,}(?=['"]?[.!?,;:])""")
_BETWEEN_SPACES = re.compile(r"(?<= )[A-Za-z]{3,}(?= )")
_SMALL_WORD_START = re.compile(r"(?<= )(?=[a-z])")
_FUNCTION_WORD_LIST = """
a about above after again against all also am an and another any are as at away be because been before behind being
below between both but by came can could did do does done down each even ever every few for from get go had has have
he her here hers herself him himself his how i if in into is it its itself just like made make many may me might more
most much must my myself never no nor not nothing now of off on once one only or other our ours out over own said same
saw say shall she should so some something still such than that the their theirs them themselves then there these they
this those though through thus till to too under until up upon us very was we well went were what when where which
while who whom whose why will with within without would yet you your yours yourself
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


@dataclass(frozen=True)
class Sentence:
    """The span [start, end) of one sentence in the text of its book."""

    start: int
    end: int


@dataclass(frozen=True)
class Book:
    """A book's text, its sentences in order, and how often each word occurs in it."""

    text: str
    sentences: tuple[Sentence, ...]
    counts: Counter[str]


@dataclass(frozen=True)
class Passage:
    """A slice of a book: context, one space, continuation.

    Attributes:
        sentence: number of the sentence of the book in which it is cut.
        context: text before the cut.
        continuation: text after the cut.
        word: last word of the context, in nano_swap alone.
        other: rival of that word, in nano_swap alone.
    """

    sentence: int
    context: str
    continuation: str
    word: str = ""
    other: str = ""

    @property
    def text(self) -> str:
        """The whole slice."""
        return f"{self.context} {self.continuation}"


def read_book(text: str) -> Book:
    """Split a text into sentences and count its words."""
    return Book(text, tuple(split_sentences(text)), Counter(_WORD.findall(text)))


def split_sentences(text: str) -> Iterator[Sentence]:
    """Yield the sentences of a text.

    A sentence ends at a line end, or at . ! ? (and closing quotes) before a space and no small letter.
    """
    start = 0
    for line in text.splitlines(keepends=True):
        stop = start + len(line)
        end = start + len(line.rstrip())
        for match in _SENTENCE_END.finditer(text, start, end):
            goes_on = text[match.end() + 1].islower() or _ABBREVIATION.search(text, start, match.start() + 1)
            if not goes_on:
                yield Sentence(start, match.end())
                start = match.end() + 1
        if start < end:
            yield Sentence(start, end)
        start = stop


def find_start(book: Book, sentence: int, cut: int, room: int) -> int:
    """Return the start of the earliest sentence up to the given one that is within `room` characters of `cut`."""
    while sentence > 0 and cut - book.sentences[sentence - 1].start <= room:
        sentence -= 1
    return book.sentences[sentence].start


def is_content(word: str) -> bool:
    """Return whether a word has three letters or more and no apostrophe, and is not a function word."""
    return len(word) >= 3 and "'" not in word and word.lower() not in _FUNCTION_WORDS


def draw_order(items: Iterable[T], salt: str, text_of: Callable[[T], str]) -> list[T]:
    """Return the items ordered by the SHA-256 of salt and text, which is a shuffle without random state."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}\0{text_of(item)}".encode()).digest())


def draw_passages(
    books: Sequence[Book], find: Callable[[Book], Iterable[Passage]], used: set[str]
) -> list[tuple[Passage, Book]]:
    """Return the passages that `find` finds in the books, in drawn order, at most one for each sentence.

    Texts in `used` are left out.
    """
    found = [(passage, book) for book in books for passage in find(book)]
    taken: set[object] = set(used)
    drawn = []
    for passage, book in draw_order(found, "passage", lambda pair: pair[0].text):
        keys = {passage.text, (id(book), passage.sentence)}
        if taken.isdisjoint(keys):
            drawn.append((passage, book))
            taken |= keys
    return drawn


def list_content(text: str) -> set[str]:
    """Return the content words of a text, in small letters."""
    return {word.lower() for word in _WORD.findall(text) if is_content(word)}


def draw_distractors(true: Passage, pool: Sequence[Passage], number: int) -> list[str]:
    """Return continuations of other passages of the book, fewer than `number` if there are not enough.

    They come from far away, are as long as the true one to within 10%, and share no content word with its context.
    """
    length, content = len(true.continuation), list_content(true.context)
    rivals = {
        other.continuation
        for other in pool
        if abs(other.sentence - true.sentence) >= FAR and abs(len(other.continuation) - length) <= LENGTH_SLACK * length
    }
    rivals.discard(true.continuation)  # the book may have the same words elsewhere, as in a refrain
    drawn = draw_order(rivals, true.text, str)
    return list(islice((rival for rival in drawn if content.isdisjoint(list_content(rival))), number))


def find_cloze(book: Book) -> Iterator[Passage]:
    """Yield passages of 100 to 280 characters that end on a content word before a punctuation mark.

    The word has occurred in the passage before. It follows the word before it at least 4 times in the book, as
    the nano models are at zero on rarer endings.
    """
    pairs = Counter(pairwise(_WORD.findall(book.text)))
    for index, sentence in enumerate(book.sentences):
        for match in _CLAUSE_FINAL.finditer(book.text, sentence.start, sentence.end):
            word = match.group()
            start = find_start(book, index, match.end(), 280)
            context = book.text[start : match.start() - 1]
            before = _WORD.findall(context)
            fits = 100 <= match.end() - start <= 280 and is_content(word)
            if fits and word in before and context.endswith(before[-1]) and pairs[before[-1], word] >= 4:
                yield Passage(index, context, word)


def find_choice(book: Book) -> Iterator[Passage]:
    """Yield sentences of 30 to 90 characters after 80 to 260 characters of the book.

    They are in the same paragraph as the sentence before them and share a content word with the context.
    """
    for index, sentence in enumerate(book.sentences):
        start = find_start(book, index, sentence.start, 260)
        context, between = book.text[start : sentence.start - 1], book.text[sentence.start - 1 : sentence.start]
        text = book.text[sentence.start : sentence.end]
        fits = between == " " and len(context) >= 80 and 30 <= len(text) <= 90
        if fits and not list_content(context).isdisjoint(list_content(text)):
            yield Passage(index, context, text)


def find_swap(book: Book) -> Iterator[Passage]:
    """Yield passages with a content word that the text after it repeats and the text before it lacks.

    30 to 150 characters lead up to the word. 20 to 130 follow, to the end of the first sentence that repeats
    it. `draw_rival` draws its rival.
    """
    for index, sentence in enumerate(book.sentences):
        for match in _BETWEEN_SPACES.finditer(book.text, sentence.start, sentence.end):
            word = match.group()
            before = book.text[find_start(book, index, match.start(), 120) : match.start()]
            if not (30 <= len(before) <= 150 and is_content(word)) or word in _WORD.findall(before):
                continue
            after = find_repeat(book, index, match.end() + 1, word)
            if 20 <= len(after) <= 130 and "_" not in before + after:
                other = draw_rival(book, word, before, after)
                if other is not None:
                    yield Passage(index, before + word, after, word, other)


def draw_rival(book: Book, word: str, before: str, after: str) -> str | None:
    """Return a content word that the passage lacks and that has the capital and the ending of `word`.

    It is half to twice as frequent in the book. None if there is no such word.
    """
    present = set(_WORD.findall(f"{before} {after}"))
    frequency = range((book.counts[word] + 1) // 2, 2 * book.counts[word] + 1)
    rivals = [
        other
        for other, count in book.counts.items()
        if count in frequency and count >= 3 and is_content(other) and word_shape(other) == word_shape(word)
        if other not in present
    ]
    return next(iter(draw_order(rivals, after, str)), None)


def find_repeat(book: Book, sentence: int, start: int, word: str) -> str:
    """Return the text from `start` to the end of the first of four sentences that repeats the word, "" if none does."""
    for candidate in book.sentences[sentence : sentence + 4]:
        if word in _WORD.findall(book.text, max(start, candidate.start), candidate.end):
            return book.text[start : candidate.end]
    return ""


def word_shape(word: str) -> tuple[bool, str]:
    """Return whether a word has a capital, and its grammatical ending. Both tell its part of speech roughly."""
    ending = next((ending for ending in ("ing", "ed", "ly", "s") if word.endswith(ending)), "")
    return word[0].isupper(), ending


def find_endings(book: Book) -> Iterator[Passage]:
    """Yield sentences cut before one of their small words: 60 to 260 characters of context, 12 to 40 of ending."""
    for index, sentence in enumerate(book.sentences):
        start = find_start(book, index, sentence.start, 160)
        for match in _SMALL_WORD_START.finditer(book.text, sentence.start + 15, sentence.end):
            context, ending = book.text[start : match.start() - 1], book.text[match.start() : sentence.end]
            if 12 <= len(ending) <= 40 and 60 <= len(context) <= 260:
                yield Passage(index, context, ending)


def build_cloze(books: Sequence[Book], used: set[str]) -> list[Item]:
    """Return items in LAMBADA's format, {text}, whose target is the last word."""
    return [{"text": passage.text} for passage, _ in draw_passages(books, find_cloze, used)[:ITEMS]]


def build_choice(books: Sequence[Book], used: set[str]) -> list[Item]:
    """Return items in PIQA's format, {goal, sol1, sol2, label}."""
    return [
        {"goal": context, "sol1": texts[0], "sol2": texts[1], "label": gold}
        for context, texts, gold in draw_questions(books, find_choice, 2, used)
    ]


def build_swap(books: Sequence[Book], used: set[str]) -> list[Item]:
    """Return items in WinoGrande's format, {sentence, option1, option2, answer}.

    The blank in the sentence is "_", and the answer is "1" or "2".
    """
    items: list[Item] = []
    for passage, _ in draw_passages(books, find_swap, used)[:ITEMS]:
        gold = len(items) % 2
        options = (passage.word, passage.other) if gold == 0 else (passage.other, passage.word)
        sentence = f"{passage.context.removesuffix(passage.word)}_ {passage.continuation}"
        items.append({"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(gold + 1)})
    return items


def build_endings(books: Sequence[Book], used: set[str]) -> list[Item]:
    """Return items in HellaSwag's format, {ctx, endings, label}."""
    return [
        {"ctx": context, "endings": texts, "label": gold}
        for context, texts, gold in draw_questions(books, find_endings, 4, used)
    ]


def draw_questions(
    books: Sequence[Book], find: Callable[[Book], Iterable[Passage]], choices: int, used: set[str]
) -> list[tuple[str, list[str], int]]:
    """Return (context, continuations, place of the true one) of at most ITEMS passages with enough distractors.

    The place goes 0, 1, ..., choices - 1, 0, 1, ..., so that it is balanced in any first part of the items too.
    """
    drawn = draw_passages(books, find, used)
    pools = {id(book): [passage for passage, source in drawn if source is book] for book in books}
    rows: list[tuple[str, list[str], int]] = []
    for passage, book in drawn:
        if len(rows) == ITEMS:
            break
        texts = draw_distractors(passage, pools[id(book)], choices - 1)
        if len(texts) == choices - 1:
            gold = len(rows) % choices
            rows.append((passage.context, [*texts[:gold], passage.continuation, *texts[gold:]], gold))
    return rows


def fill_in(task: str, item: Item) -> str:
    """Return the item's text with the true answer in place, which is a slice of a book."""
    match task, item:
        case "nano_cloze", {"text": str(text)}:
            return text
        case "nano_choice", {"goal": str(goal), "label": int(label)}:
            return f"{goal} {item[f'sol{label + 1}']}"
        case "nano_swap", {"sentence": str(sentence), "answer": str(answer)}:
            return sentence.replace("_", str(item[f"option{answer}"]))
        case "nano_endings", {"ctx": str(context), "endings": list(endings), "label": int(label)}:
            return f"{context} {endings[label]}"
    raise ValueError(f"not an item of {task}: {item}")


BUILDERS: dict[str, Callable[[Sequence[Book], set[str]], list[Item]]] = {
    "nano_cloze": build_cloze,
    "nano_choice": build_choice,
    "nano_swap": build_swap,
    "nano_endings": build_endings,
}


def build_tasks(texts: Sequence[str]) -> dict[str, str]:
    """Return the JSON lines of each task, made from the texts of the books.

    No two items have the same text, not even in different tasks. lm-eval 0.4.13 shares logits between requests that
    are equal as text, and scores them wrong where they are cut into context and continuation in different places.
    """
    books = [read_book(text) for text in texts]
    used: set[str] = set()
    lines = {}
    for task, build in BUILDERS.items():
        items = build(books, used)
        used.update(fill_in(task, item) for item in items)
        lines[task] = "".join(json.dumps(item) + "\n" for item in items)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the books and write an xz file of JSON lines for each task."""
    parser = argparse.ArgumentParser(description="Build the four nano tasks from the held-out books.")
    parser.add_argument("--books", type=Path, required=True, help="folder of 236.txt, 289.txt, 55.txt and 902.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write nano_<task>.jsonl.xz to")
    options = parser.parse_args(arguments)
    texts = [(options.books / f"{book}.txt").read_text(encoding="utf-8") for book in BOOKS]
    options.out.mkdir(parents=True, exist_ok=True)
    for task, lines in build_tasks(texts).items():
        data = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
        (options.out / f"{task}.jsonl.xz").write_bytes(data)
        print(f"{task}: {lines.count(chr(10))} items, {len(data)} bytes")


if __name__ == "__main__":
    main()
