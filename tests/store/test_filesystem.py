"""The places where a store can lie: a folder, memory, and an S3 server on this machine."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import fsspec.implementations.memory
import pytest
from toy_results import fill, make_result

from kbit.store.filesystem import STALE_SECONDS, LocalFiles, open_files
from kbit.store.readers import list_keys, read_failures, read_results
from kbit.store.store import Store


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket of a local S3 server."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    service = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    service.start()
    host, port = service.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    import s3fs

    s3fs.S3FileSystem().mkdir("studies")
    yield "s3://studies"
    service.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a store."""
    if request.param == "folder":
        return str(tmp_path / "results")
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://studies"
    return f"{root}/{uuid.uuid4().hex}"


def test_a_file_is_created_once(place: str) -> None:
    files = open_files(place)
    assert not files.is_store()
    files.prepare(("experiments",))
    assert files.is_store()
    assert files.create("experiments/a.json", b"first")
    assert not files.create("experiments/a.json", b"second")
    assert files.open("experiments/a.json").read() == b"first"
    assert files.names("experiments", ".json") == ["experiments/a.json"]
    files.remove("experiments/a.json")
    files.remove("experiments/a.json")
    assert files.names("experiments", ".json") == files.names("nowhere", ".json") == []
    with pytest.raises(FileNotFoundError):
        files.open("experiments/a.json")


def test_a_store_works_anywhere(place: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results at"):
        read_results(place)
    store = Store(place)
    for number in range(4):
        store.write(make_result(number))
    store.write_failure(make_result(9).key, make_result(9).experiment, "no", "")
    fill(tmp_path / "local", range(4))
    expected = read_results(tmp_path / "local").to_csv()
    assert read_results(place).to_csv() == expected
    assert store.compact() == 4
    assert read_results(place).to_csv() == expected
    assert store.delete([make_result(0).key]) == 1
    assert list_keys(place) == ({make_result(n).key for n in (1, 2, 3)}, {make_result(9).key})
    assert read_failures(place)["reason"].tolist() == ["no"]
    assert store.merge(tmp_path / "local") == (1, 3)


def test_a_store_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match=r"results=nonsense://x: .*nonsense"):
        Store("nonsense://x")


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    Store(tmp_path)
    old, new = (tmp_path / "experiments" / f".0123-{name}" for name in ("old", "new"))
    for left in (old, new):
        left.write_text("{")
    past = new.stat().st_mtime - STALE_SECONDS - 1
    os.utime(old, (past, past))
    LocalFiles(tmp_path).prepare(("experiments",))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_failed_write_is_no_result(tmp_path: Path) -> None:
    """A full disk: the kernel's own, /dev/full, in the place of the temporary file."""
    store = Store(tmp_path)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "with_name", lambda path, name: full)
        with pytest.raises(OSError, match="No space left on device"):
            store.write(make_result(0))
    assert store.finished_keys() == set()


@pytest.mark.parametrize("ask", [Store, list_keys, read_results])
def test_a_store_out_of_reach_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    for method in ("exists", "makedirs", "ls"):
        refuse = mock.Mock(side_effect=exceptions.NoCredentialsError())
        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, method, refuse)
    with pytest.raises(OSError, match=r"^results=memory://away: NoCredentialsError: Unable to locate credentials$"):
        ask("memory://away")
