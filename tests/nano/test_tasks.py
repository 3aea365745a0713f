"""The nano tasks: the builder's rules on small books, and the shipped files."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kbit.nano.tasks import (
    BOOKS,
    BUILDERS,
    FAR,
    Book,
    Passage,
    build_tasks,
    draw_distractors,
    draw_order,
    fill_in,
    find_cloze,
    find_endings,
    find_swap,
    is_content,
    main,
    read_book,
    split_sentences,
    word_shape,
)

ASSETS = Path(str(files("kbit"))) / "assets"
SHARED_BOOKS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "train" / "gutenberg-children"
needs_books = pytest.mark.skipif(not SHARED_BOOKS.is_dir(), reason="the books are not beside the repository")

Items = list[dict[str, Any]]

NOUNS = ("badger", "otter", "weasel", "rabbit", "hedgehog", "squirrel", "stoat", "ferret")
PLACES = ("river", "meadow", "garden", "forest", "cellar", "kitchen", "harbour", "village")


def make_book(seed: int) -> str:
    """Thirty paragraphs of four plain sentences; no two paragraphs are equal."""
    lines = []
    for index in range(30):
        noun = NOUNS[(index + seed) % len(NOUNS)]
        place = PLACES[(index * 3 + index // 8 + seed) % len(PLACES)]
        lines.append(
            f"Number {seed}{index} was the day when a {noun} came slowly out of the {place} at dawn. "
            f"It was a cold morning and the little {noun} shook its wet coat. "
            f'"We never liked the {place} much," said the {noun} to its friends. '
            f"So the {noun} walked home again along the path from the {place}."
        )
    return "\n".join(lines) + "\n"


def read_shipped(task: str) -> Items:
    """The items of one shipped task."""
    with lzma.open(ASSETS / "tasks" / "data" / f"{task}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_held_out() -> list[str]:
    """The texts of the four books, from the shipped held-out stream."""
    with lzma.open(ASSETS / "text" / "nano_held_out.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def list_golds(task: str) -> list[int]:
    """The place of the true answer of every shipped item."""
    key, first = {"nano_choice": ("label", 0), "nano_swap": ("answer", 1), "nano_endings": ("label", 0)}[task]
    return [int(item[key]) - first for item in read_shipped(task)]


def test_sentences_end_at_marks_and_lines() -> None:
    text = 'Mr. Toad ran off. "Stop!" cried the Rat. "Why?"\nHe fell\n'
    found = [text[sentence.start : sentence.end] for sentence in split_sentences(text)]
    assert found == ["Mr. Toad ran off.", '"Stop!" cried the Rat.', '"Why?"', "He fell"]


def test_sentences_cover_the_text() -> None:
    text = make_book(0)
    spans = list(split_sentences(text))
    assert len(spans) == 120
    gaps = [text[left.end : right.start] for left, right in pairwise(spans)]
    assert set(gaps) == {" ", "\n"}


@pytest.mark.parametrize(
    ("word", "content"), [("river", True), ("the", False), ("The", False), ("ox", False), ("don't", False)]
)
def test_content_words(word: str, content: bool) -> None:
    assert is_content(word) is content


def test_word_shape_is_capital_and_ending() -> None:
    assert word_shape("Running") == (True, "ing")
    assert word_shape("cats") == (False, "s")
    assert word_shape("mole") == (False, "")


def test_draw_order_does_not_depend_on_the_order_given() -> None:
    assert draw_order("abcdefgh", "salt", str) == draw_order("hgfedcba", "salt", str)
    assert draw_order("abcdefgh", "salt", str) != draw_order("abcdefgh", "pepper", str)


def test_cloze_word_has_occurred_before() -> None:
    passages = list(find_cloze(read_book(make_book(0))))
    assert passages
    assert all(f" {passage.continuation}" in passage.context for passage in passages)


def test_swap_word_is_repeated_after_and_new() -> None:
    passages = list(find_swap(read_book(make_book(0))))
    assert passages
    for passage in passages:
        before = passage.context.removesuffix(passage.word)
        assert passage.word in passage.continuation
        assert f" {passage.word} " not in before
        assert passage.other not in passage.text.replace(",", "").replace(".", "").split()


def test_endings_are_the_end_of_their_sentence() -> None:
    book = read_book(make_book(0))
    for passage in find_endings(book):
        sentence = book.sentences[passage.sentence]
        assert book.text[sentence.start : sentence.end].endswith(passage.continuation)
        assert passage.text in book.text


def test_distractors_are_far_and_of_like_length() -> None:
    true = Passage(100, "context", "x" * 20)
    near, far, long = Passage(100 + FAR - 1, "", "n" * 20), Passage(100 + FAR, "", "f" * 22), Passage(0, "", "l" * 23)
    assert draw_distractors(true, [near, far, long], 3) == ["f" * 22]


def test_builder_is_deterministic_and_writes_what_it_builds(tmp_path: Path) -> None:
    texts = [make_book(seed) for seed in range(len(BOOKS))]
    for name, text in zip(BOOKS, texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    built = build_tasks(texts)
    assert built == build_tasks(texts)
    main(["--books", str(tmp_path), "--out", str(tmp_path / "out")])
    for task, lines in built.items():
        assert lzma.decompress((tmp_path / "out" / f"{task}.jsonl.xz").read_bytes()).decode() == lines


@pytest.mark.parametrize("task", BUILDERS)
def test_shipped_task_has_500_to_700_items(task: str) -> None:
    assert 500 <= len(read_shipped(task)) <= 700


def test_no_text_is_in_two_items() -> None:
    """lm-eval mixes up the logits of requests with equal text and different cuts."""
    texts = [fill_in(task, item) for task in BUILDERS for item in read_shipped(task)]
    assert len(set(texts)) == len(texts)


def test_fill_in_refuses_another_tasks_item() -> None:
    with pytest.raises(ValueError, match="nano_cloze"):
        fill_in("nano_cloze", {"goal": "a"})


def test_shipped_items_are_well_formed() -> None:
    for item in read_shipped("nano_cloze"):
        assert set(item) == {"text"}
        context, word = item["text"].rsplit(" ", 1)
        assert word.isalpha()
        assert word in context
    for item in read_shipped("nano_choice"):
        assert set(item) == {"goal", "sol1", "sol2", "label"}
        assert item["label"] in (0, 1)
        assert item["sol1"] != item["sol2"]
    for item in read_shipped("nano_swap"):
        assert set(item) == {"sentence", "option1", "option2", "answer"}
        assert item["answer"] in ("1", "2")
        assert item["sentence"].count("_") == 1
        assert item["option1"] != item["option2"]
    for item in read_shipped("nano_endings"):
        assert set(item) == {"ctx", "endings", "label"}
        assert item["label"] in range(4)
        assert len(set(item["endings"])) == 4


@pytest.mark.parametrize(("task", "places"), [("nano_choice", 2), ("nano_swap", 2), ("nano_endings", 4)])
def test_gold_places_are_balanced(task: str, places: int) -> None:
    golds = list_golds(task)
    share, number = 1 / places, len(golds)
    # Under fair places each count is binomial(n, 1/places); 1.96 standard deviations hold 95% of it.
    bound = 1.96 * math.sqrt(number * share * (1 - share))
    counts = Counter(golds)
    assert all(abs(counts[place] - number * share) <= bound for place in range(places))


@pytest.mark.parametrize("task", BUILDERS)
def test_true_answers_come_from_the_books(task: str) -> None:
    text = "\n".join(read_held_out())
    assert all(fill_in(task, item) in text for item in read_shipped(task))


def test_shipped_tasks_rebuild_from_the_shipped_books() -> None:
    built = build_tasks(read_held_out())
    for task, lines in built.items():
        assert lzma.decompress((ASSETS / "tasks" / "data" / f"{task}.jsonl.xz").read_bytes()).decode() == lines


@needs_books
def test_held_out_stream_is_the_four_books() -> None:
    assert read_held_out() == [(SHARED_BOOKS / f"{book}.txt").read_text(encoding="utf-8") for book in BOOKS]


def test_preprocessing_runs_outside_the_package() -> None:
    source = (ASSETS / "tasks" / "preprocess.py").read_text()
    assert "kbit" not in source


def test_a_book_counts_its_words() -> None:
    book: Book = read_book("The mole saw the mole.\n")
    assert book.counts == Counter({"mole": 2, "The": 1, "the": 1, "saw": 1})
