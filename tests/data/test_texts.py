"""The identity of texts: by content, found anew when a file changes, however it is written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import kbit.data.texts
from kbit.data.text_files import read_bytes
from kbit.data.texts import EMBEDDED_TEXTS, read_documents
from kbit.data.windows import make_windows
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.identity import find_key, identify_text, name_content


def test_an_edit_that_keeps_size_and_time_of_modification_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("one mouse")
    before, modified = identify_text(str(path)), path.stat().st_mtime_ns
    path.write_text("two mice ")
    os.utime(path, ns=(modified, modified))
    assert path.stat().st_mtime_ns == modified
    assert identify_text(str(path)) == sha256(b"two mice ").hexdigest() != before


def test_the_hash_is_of_the_very_bytes_that_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is replaced at each read: the documents and the hash must be of one of them."""
    contents = iter([b"first", b"second", b"third"])
    path = tmp_path / "story.txt"
    path.write_bytes(b"zeroth")
    monkeypatch.setattr(kbit.data.texts, "read_bytes", lambda _: next(contents))
    [document], digest = read_documents(str(path))
    assert sha256(document.encode()).hexdigest() == digest


def test_a_content_has_the_name_that_its_text_has(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("one mouse")
    for name in ("nano_held_out", "c4", str(path)):
        digest = "of the hub" if name == "c4" else read_documents(name)[1]
        assert name_content(name, digest) == identify_text(name)


@pytest.mark.parametrize("place", ["path", "relative path", "copy", "decompressed copy", "link"])
def test_an_embedded_text_is_itself_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    embedded = EMBEDDED_TEXTS / "nano_held_out.jsonl.xz"
    monkeypatch.chdir(EMBEDDED_TEXTS if place == "relative path" else tmp_path)
    match place:
        case "path":
            name = str(embedded)
        case "relative path":
            name = embedded.name
        case "copy":
            name = str(shutil.copy(embedded, tmp_path / "mine.jsonl.xz"))
        case "decompressed copy":
            name = "mine.jsonl"
            Path(name).write_bytes(read_bytes(embedded))
        case _:
            name = "link.jsonl.xz"
            Path(name).symlink_to(embedded)
    assert identify_text(name) == "nano_held_out"
    assert find_key(Experiment(eval=EvalConfig(perplexity=name))) == find_key(Experiment())
    assert name_content(name, read_documents(name)[1]) == "nano_held_out"


def test_the_same_bytes_as_lines_and_as_one_document_are_two_texts(tmp_path: Path) -> None:
    lines, whole = str(tmp_path / "story.jsonl"), str(tmp_path / "story.txt")
    for name in (lines, whole):
        Path(name).write_text('{"text": "one"}\n{"text": "two"}\n')
    assert len(read_documents(lines)[0]) == 2 != len(read_documents(whole)[0])
    assert identify_text(lines) != identify_text(whole)


def test_bytes_of_an_embedded_text_named_txt_are_not_it(tmp_path: Path) -> None:
    name = tmp_path / "mine.txt"
    name.write_bytes(read_bytes(EMBEDDED_TEXTS / "nano_held_out.jsonl.xz"))
    assert identify_text(str(name)) == sha256(name.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["story.txt", "story.jsonl"])
@pytest.mark.parametrize(("content", "why"), [(b"", "has no text"), (b"\xff\xfe", "is not a text in UTF-8")])
def test_a_file_without_a_text_is_named(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/{name} {why}"):
        read_documents(str(tmp_path / name))


@pytest.mark.parametrize("name", ["e.JSONL", "e.ndjson", "e.jsonlines", "e.JSONL.GZ"])
def test_json_lines_have_several_suffixes_in_any_case(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + b'{"text": "Once upon a time"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read_documents(str(tmp_path / name)) == (["Once upon a time"], sha256(content).hexdigest())
    assert identify_text(str(tmp_path / name)) == f"{sha256(content).hexdigest()}.jsonl"


@pytest.mark.parametrize("name", ["e.CSV", "e.Parquet", "e.html.GZ"])
def test_a_table_is_no_text_whatever_the_case_of_its_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text\nOnce\n")
    with pytest.raises(ValueError, match="is neither a plain text"):
        read_documents(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_bytes("\ufeffOnce".encode())
    assert read_documents(str(tmp_path / "e.txt"))[0] == ["Once"]


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("text", ["Once <|endoftext|> upon ", "a\u00e9\u65e5\U0001f600 ", "Once upon a time "])
def test_the_bytes_per_token_are_those_of_the_text_itself(
    tmp_path: Path, tokenizer: Any, text: str, most: int | None
) -> None:
    path = tmp_path / "e.txt"
    path.write_text(text * 400)
    ids = tokenizer(text * 400, add_special_tokens=False)
    windows = make_windows(str(path), tokenizer, context=50, max_windows=most)
    scored = windows.tokens.numel() - 1  # of the text, after the end-of-text token
    assert windows.tokens.flatten().tolist() == [0, *ids["input_ids"][:scored]]
    covered = (text * 400)[: ids.token_to_chars(scored - 1).end]
    assert windows.bytes_per_token * windows.tokens.numel() == pytest.approx(len(covered.encode()))


def test_windows_of_several_documents_cover_whole_ones_and_the_start_of_the_last(
    tmp_path: Path, tokenizer: Any
) -> None:
    documents = ["Once upon a time", "", "there was a small mouse in a house " * 9]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    windows = make_windows(str(tmp_path / "e.jsonl"), tokenizer, context=20, max_windows=None)
    first = len(tokenizer(documents[0])["input_ids"])
    cut = tokenizer(documents[2]).token_to_chars(windows.tokens.numel() - first - 3 - 1).end
    assert windows.bytes_per_token * windows.tokens.numel() == pytest.approx(len(documents[0]) + cut)


def test_a_tokenizer_that_knows_few_characters_makes_the_text_no_shorter(tmp_path: Path) -> None:
    """Every unknown character decodes to [UNK]: what is decoded would be 2.4 times as long as the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lossy: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")  # type: ignore[no-untyped-call]
    (tmp_path / "e.txt").write_text("b c a " * 60)
    windows = make_windows(str(tmp_path / "e.txt"), lossy, context=30, max_windows=2)
    assert windows.bytes_per_token == pytest.approx((60 * 2 - 1) / 60)
