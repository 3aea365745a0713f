"""The places where a store can lie: a folder, memory, and an S3 server on this machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import fsspec.exceptions
import fsspec.implementations.memory
import pytest
from toy_results import fill, make_result

from kbit.store.filesystem import (
    RESULT_BYTES,
    STALE_SECONDS,
    LocalFiles,
    RemoteFiles,
    UnreachableError,
    check_space,
    check_writable,
    open_files,
)
from kbit.store.readers import list_keys, read_failures, read_results
from kbit.store.records import retry
from kbit.store.results import find_damaged
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


@pytest.mark.parametrize(
    "error", [fsspec.exceptions.FSTimeoutError(), ConnectionError("reset"), RuntimeError("aiohttp")]
)
def test_a_network_error_is_no_damage(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It comes while a file is read, which was found and opened."""
    place = f"memory://timeouts/{uuid.uuid4().hex}"
    store = Store(place)
    store.write(make_result(0))
    store.compact()
    with monkeypatch.context() as patched:
        patched.setattr(fsspec.implementations.memory.MemoryFile, "read", mock.Mock(side_effect=error))
        patched.setattr(fsspec.implementations.memory.MemoryFileSystem, "cat_file", mock.Mock(side_effect=error))
        for ask in (read_results, find_damaged, list_keys):
            with pytest.raises(UnreachableError, match=f"^results={place}: {type(error).__name__}"):
                ask(place)
    assert len(read_results(place)) == 2


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_locks_or_syncs_of_folders_holds_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    store = fill(tmp_path / "results", range(3))
    store.write(make_result(0, value=0.9))  # the first one stays here, too
    assert store.compact() == 3
    assert store.delete([make_result(1).key]) == 1
    table = read_results(tmp_path / "results")
    assert table.query("metric == 'acc'")["value"].tolist() == [0.5, 0.5]
    assert [path for path in tmp_path.rglob(".*") if path.name != ".lock"] == []


def test_another_error_of_a_link_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EDQUOT, "Quota exceeded")))
    with pytest.raises(OSError, match="Quota exceeded"):
        Store(tmp_path).write(make_result(0))
    assert list_keys(tmp_path) == (set(), set())


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert Store("~/study").root == str(tmp_path / "home" / "study")
    check_writable("~/study")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    with pytest.raises(ValueError, match="results=~nobody-of-this-name/x"):
        Store("~nobody-of-this-name/x")


def test_a_full_disk_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=10 * RESULT_BYTES))
    check_space(tmp_path / "new" / "results", 10)
    check_space("memory://anywhere", 11)
    with pytest.raises(OSError, match=r"results=.*results: 2 MB are free, and 11 results may take 2 MB"):
        check_space(tmp_path / "new" / "results", 11)


def test_a_reader_waits_for_compactions_that_go_on_and_on(tmp_path: Path) -> None:
    """Files go as often as it looks, until it takes the lock."""
    files = open_files(fill(tmp_path, range(1)).path)
    with files.lock():
        pass
    looks = 0

    def read() -> str:
        nonlocal looks
        looks += 1
        with (tmp_path / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "read"
        raise FileNotFoundError

    assert retry(files, read) == "read"
    assert looks > 3
    with pytest.raises(FileNotFoundError):
        retry(open_files("memory://nowhere"), mock.Mock(side_effect=FileNotFoundError))


def test_a_forgotten_failure_stops_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        store.write_failure(make_result(number).key, make_result(number).experiment, "no", "")
    gone = f"failures/{make_result(1).key}.json"
    opened = LocalFiles.open

    def forget_and_open(files: LocalFiles, name: str) -> BinaryIO:
        files.remove(gone)
        return opened(files, name)

    monkeypatch.setattr(LocalFiles, "open", forget_and_open)
    assert read_failures(tmp_path)["key"].tolist() == [make_result(2).key]


@pytest.mark.parametrize("step", range(12))
def test_what_is_deleted_beside_a_compaction_does_not_come_back(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Where there is no lock, whenever it is deleted, and if the compaction is killed after its next step."""
    place = f"memory://deleted/{uuid.uuid4().hex}"
    store = Store(place)
    for number in range(3):
        store.write(make_result(number))
    store.compact()
    for number in range(3, 6):
        store.write(make_result(number))
    gone = {make_result(0).key, make_result(4).key}
    kept = {make_result(number).key for number in (1, 2, 3, 5)}
    steps, deletes = 0, False

    def interfere(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal steps, deletes
            steps += not deletes
            if steps == step + 1 and not deletes:
                deletes = True
                assert Store(place).delete(gone) == 2
                deletes = False
                steps += 1
            if steps == step + 4:
                raise KeyboardInterrupt
            return act(*arguments)

        return run

    with monkeypatch.context() as patched:
        for name in ("create", "remove", "names"):
            patched.setattr(RemoteFiles, name, interfere(getattr(RemoteFiles, name)))
        with contextlib.suppress(KeyboardInterrupt, FileNotFoundError):
            Store(place).compact()
    assert list_keys(place)[0] == Store(place).finished_keys() == set(read_results(place)["key"]) == kept
    Store(place).compact()
    assert set(read_results(place)["key"]) == kept
    assert not Store(place).has(make_result(4).key)
    Store(place).write(make_result(4, value=0.7))  # and it can be measured again
    table = read_results(place).query("metric == 'acc'").set_index("key")["value"]
    assert (set(table.index), table[make_result(4).key]) == ({*kept, make_result(4).key}, 0.7)
    assert Store(place).has(make_result(4).key)
