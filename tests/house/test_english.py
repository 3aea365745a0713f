"""The English of docstrings and comments: short sentences, the noun named."""

from __future__ import annotations

from english import read_texts

SEMICOLONS = 0.5  # per 100 words; well-read codebases of this field have 0 to 0.4

TEXTS = list(read_texts())


def test_sentences_end_instead_of_going_on_after_a_semicolon() -> None:
    semicolons, words = sum(text.semicolons for text in TEXTS), sum(text.words for text in TEXTS)
    assert words > 10_000
    assert 100 * semicolons / words <= SEMICOLONS


def test_an_attribute_names_its_noun() -> None:
    wrong = [f"{text.path.name}:{text.line}: {entry}" for text in TEXTS for entry in text.entries_with_of]
    assert not wrong
