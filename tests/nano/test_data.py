"""The nano models' training text: what is read, the tokenizer, and the batches drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.models.catalog import EMBEDDED
from kbit.nano.data import read_training_documents, train_tokenizer
from kbit.training.batches import draw_batch, tokenize_stream

SHARED_TEXT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "train"
STORIES = [
    "The mouse sat under the old tree.",
    "The mouse ate the cheese.\nThen it slept.",
    "Caf\u00e9 \u2013 the end.",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two books, a held-out one, and two stories, as the recipe expects them."""
    (tmp_path / "gutenberg-children").mkdir()
    (tmp_path / "tinystories").mkdir()
    for name, text in [("11", "Alice"), ("113", "Garden"), ("236", "Mowgli, held out")]:
        (tmp_path / "gutenberg-children" / f"{name}.txt").write_text(text)
    lines = "".join(json.dumps({"text": story}) + "\n" for story in STORIES[:2])
    (tmp_path / "tinystories" / "a_train_part.jsonl").write_text(lines)
    (tmp_path / "tinystories" / "a_validation_part.txt").write_text("not for training")
    return tmp_path


def test_held_out_books_and_validation_parts_are_not_read(folder: Path) -> None:
    assert read_training_documents(folder) == ["Alice", "Garden", *STORIES[:2]]


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gutenberg-children/\*\.txt.*" + tmp_path.name):
        read_training_documents(tmp_path)


def test_the_same_text_gives_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(STORIES * 5, 300).to_str() for _ in range(2))
    assert first == second


@settings(max_examples=50)
@given(text=st.text())
def test_any_text_round_trips(text: str) -> None:
    small = train_tokenizer(STORIES * 5, 300)
    assert small.decode(small.encode(text).ids) == text


def test_end_of_text_is_token_0_and_bytes_follow() -> None:
    small = train_tokenizer(STORIES * 5, 300)
    assert (small.token_to_id("<|endoftext|>"), small.get_vocab_size()) == (0, 300)


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="the training text is not beside the repository")
def test_the_shipped_tokenizer_comes_from_the_training_text() -> None:
    trained = json.loads(train_tokenizer(read_training_documents(SHARED_TEXT)).to_str())["model"]
    shipped = json.loads((EMBEDDED / "nano-neox-98k" / "tokenizer.json").read_text())["model"]
    assert (trained["vocab"], trained["merges"]) == (shipped["vocab"], shipped["merges"])


def test_every_document_starts_with_one_end_of_text_token(tokenizer: Any) -> None:
    one, two = (tokenizer(story)["input_ids"] for story in STORIES[:2])
    assert tokenize_stream(STORIES[:2], tokenizer).tolist() == [0, *one, 0, *two]


def test_windows_are_consecutive_and_reach_both_ends() -> None:
    stream = torch.arange(20)
    starts = set()
    for step in range(40):
        batch = draw_batch(stream, step, seed=0, batch_size=4, context=16)
        assert (batch == batch[:, :1] + torch.arange(16)).all()
        starts |= set(batch[:, 0].tolist())
    assert starts == {0, 1, 2, 3, 4}


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    stream = torch.arange(10_000)

    def draw(step: int, seed: int) -> list[int]:
        return draw_batch(stream, step, seed=seed, batch_size=8, context=4)[:, 0].tolist()

    torch.manual_seed(1)
    first = draw(3, 0)
    torch.manual_seed(2)
    assert draw(3, 0) == first
    assert len({tuple(draw(step, seed)) for step in range(4) for seed in range(4)}) == 16
