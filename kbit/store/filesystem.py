"""The files of a store, in a local folder or behind an fsspec URL (s3://, gs://, memory://).

Readers see a file whole or not at all. A file's name is relative to the store: "experiments/0123456789abcdef.json".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Protocol

STALE_SECONDS: Final = 3600.0  # a temporary file lives for milliseconds, so a killed process left one of this age
RESULT_BYTES: Final = 200_000  # of a result with its log; those of ten thousand items take less
# What a file system answers that cannot do something at all: make a hard link, lock a file, sync a folder.
_NOT_SUPPORTED: Final = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EMLINK, errno.ENOLCK)
_MARKER: Final = "kbit-store"  # a file that marks a store where there are no folders


class CannotOpenError(OSError):
    """A file is there and cannot be opened: it may not be read, is a folder, or a link to what is not there."""


class UnreachableError(OSError):
    """The place behind a URL does not answer, or refuses. This says nothing of what the files hold."""


class Files(Protocol):
    """The operations that a store needs on the place where it lies."""

    root: str
    has_lock: bool  # whether `lock` keeps others out

    def is_store(self) -> bool:
        """Whether there is a store."""

    def has(self, name: str) -> bool:
        """Whether there is a file with this name."""

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Make the folders and write something. Raise OSError if that is not possible."""

    def names(self, folder: str, suffix: str) -> list[str]:
        """Return the sorted names of a folder's finished files. A folder that is not there has none."""

    def select(self, names: Sequence[str]) -> list[str]:
        """Return which of these names of one folder are there, in the order given."""

    def open(self, name: str) -> BinaryIO:
        """Open a file to read. Raise FileNotFoundError if it is not there, CannotOpenError if it cannot be opened."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that others see whole or not at all. Return False, and change nothing, if there is one."""

    def replace(self, name: str, content: bytes) -> None:
        """Write a file in place of the one of that name, if there is one. Others see the old one or the new one."""

    def remove(self, name: str) -> None:
        """Remove a file, which another process may have removed already."""

    def lock(self, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keep others from compacting and deleting. The lock ends with its process, however the process ends.

        Args:
            shared: whether others may hold the lock, too, that only read.
        """


def open_files(path: str | Path) -> Files:
    """Return the files of the store at a local path or fsspec URL."""
    return RemoteFiles(str(path)) if is_url(path) else LocalFiles(expand_home(path))


def is_url(path: str | Path) -> bool:
    """Whether a store's path is an fsspec URL."""
    return "://" in str(path)


def expand_home(path: str | Path) -> Path:
    """Return a local path with ~ as the home folder, which a shell leaves as it is in results=~/study.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"results={path}: {error}") from None


def check_space(path: str | Path, results: int) -> None:
    """Raise OSError if a local disk is too full for so many results."""
    if is_url(path):
        return
    free, needed = shutil.disk_usage(_find_existing(path)).free, results * RESULT_BYTES
    if free < needed:
        raise OSError(
            f"results={path}: {free / 1e6:.0f} MB are free, and {results} results may take {needed / 1e6:.0f} MB"
        )


def check_writable(path: str | Path) -> None:
    """Raise OSError if a store could not be made at a local path. Nothing is left there."""
    if is_url(path):
        return
    parent = _find_existing(path)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OSError(f"results={path}: cannot write to {parent}: {error.strerror}") from error


def _find_existing(path: str | Path) -> Path:
    """Return the nearest folder at or above a path that is there."""
    whole = expand_home(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.exists())


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside path, then move it there: a reader sees the old file or the new one."""
    with _open_beside(path) as temporary:
        write(temporary)
        temporary.replace(path)


@contextlib.contextmanager
def _open_beside(path: Path) -> Iterator[Path]:
    """Yield a path in the same folder. A file that still lies there at the end is removed."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


class LocalFiles:
    """Files in a local (or mounted) folder."""

    has_lock = True

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.root = str(self._path)

    def is_store(self) -> bool:
        """See Files."""
        return (self._path / "experiments").is_dir()

    def has(self, name: str) -> bool:
        """See Files."""
        return (self._path / name).exists()

    def prepare(self, folders: tuple[str, ...]) -> None:
        """See Files. Also remove the temporary files that killed writers left behind."""
        for folder in folders:
            (self._path / folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._path / folders[0]) as probe:
            now = os.fstat(probe.fileno()).st_mtime  # by the file system's clock, which may be another machine's
        for folder in folders:
            for left in (self._path / folder).glob(".*-*"):
                with contextlib.suppress(FileNotFoundError):
                    if now - left.stat().st_mtime > STALE_SECONDS:
                        left.unlink()

    def names(self, folder: str, suffix: str) -> list[str]:
        """See Files."""
        try:
            found = os.listdir(self._path / folder)  # noqa: PTH208, three times as fast as iterdir for 35,000 files
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(f"{folder}/{name}" for name in found if name.endswith(suffix) and not name.startswith("."))

    def select(self, names: Sequence[str]) -> list[str]:
        """See Files. It asks for each name, as a folder may hold thousands of others."""
        return [name for name in names if os.path.exists(f"{self.root}/{name}")]  # noqa: PTH110, as in names

    def open(self, name: str) -> BinaryIO:
        """See Files."""
        path = self._path / name
        try:
            return path.open("rb")
        except (IsADirectoryError, PermissionError) as error:
            raise CannotOpenError(error.errno, error.strerror, str(path)) from error
        except FileNotFoundError as error:
            if not path.is_symlink():
                raise
            raise CannotOpenError(error.errno, f"a link to {path.readlink()}, which is not there", str(path)) from error

    def create(self, name: str, content: bytes) -> bool:
        """See Files."""
        path = self._path / name
        with _open_beside(path) as temporary:
            _write_synced(temporary, content)
            if not _move(temporary, path):
                return False
        _sync_folder(path.parent)
        return True

    def replace(self, name: str, content: bytes) -> None:
        """See Files."""
        path = self._path / name
        replace_file(path, lambda temporary: _write_synced(temporary, content))
        _sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """See Files."""
        (self._path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """See Files. Where files cannot be locked, as on some mounted drives, this locks nothing."""
        path = self._path / ".lock"
        if shared and not path.exists():  # nobody has ever compacted, and a reader may not be allowed to write
            yield
            return
        with path.open("r" if shared else "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
            yield


class RemoteFiles:
    """Files behind an fsspec URL. An object store writes an object whole or not at all.

    There is no lock. If one process compacts while another deletes, it may write a deleted result once more. The store
    therefore keeps the keys of what was deleted (kbit.store.records.list_deleted).
    """

    has_lock = False

    def __init__(self, url: str) -> None:
        import fsspec

        self.root = url.rstrip("/")
        try:
            self._system, self._path = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
            raise ValueError(f"results={url}: {error}") from None

    def is_store(self) -> bool:
        """See Files."""
        return self.has(_MARKER)

    def has(self, name: str) -> bool:
        """See Files."""
        with self._own_errors():
            return bool(self._system.exists(f"{self._path}/{name}"))

    def prepare(self, folders: tuple[str, ...]) -> None:
        """See Files. An object store has no folders, so a file marks the store."""
        with self._own_errors():
            self._system.makedirs(self._path, exist_ok=True)
            self._system.pipe_file(f"{self._path}/{_MARKER}", b"a store of kbit\n")

    def names(self, folder: str, suffix: str) -> list[str]:
        """See Files."""
        try:
            with self._own_errors():
                found: list[str] = self._system.ls(f"{self._path}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{Path(name).name}" for name in found if name.endswith(suffix))

    def select(self, names: Sequence[str]) -> list[str]:
        """See Files. One listing takes less time than a request for each name."""
        there = set(self.names(names[0].partition("/")[0], "")) if names else set()
        return [name for name in names if name in there]

    def open(self, name: str) -> BinaryIO:
        """See Files. The whole file is read here, as reading may raise the protocol's own errors, too."""
        with self._own_errors():
            content: bytes = self._system.cat_file(f"{self._path}/{name}")
        return io.BytesIO(content)

    def create(self, name: str, content: bytes) -> bool:
        """See Files. The object store itself refuses to overwrite where it can."""
        path = f"{self._path}/{name}"
        with self._own_errors():
            try:
                self._system.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError:
                if self._system.exists(path):  # S3 says "precondition failed"
                    return False
                raise
        return True

    def replace(self, name: str, content: bytes) -> None:
        """See Files."""
        with self._own_errors():
            self._system.pipe_file(f"{self._path}/{name}", content)

    def remove(self, name: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError), self._own_errors():
            self._system.rm_file(f"{self._path}/{name}")

    def lock(self, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return a lock that locks nothing, see the class."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Raise a protocol's own errors, such as missing credentials, as an UnreachableError that names the store."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UnreachableError(f"results={self.root}: {type(error).__name__}: {error}") from error


def _move(temporary: Path, path: Path) -> bool:
    """Give a file its name. Return False if there is a file of that name.

    A hard link is atomic and refuses to overwrite. Some file systems have none (exFAT, gcsfuse, mounted cloud drives).
    There, of two writers of one name at the same moment the later one stays. Readers see one of them, whole.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if path.exists():
            return False
        temporary.replace(path)
    return True


def _write_synced(path: Path, content: bytes) -> None:
    """Write a file that survives a power failure from then on."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power failure. Only then may the files that a new file replaces be removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:  # a mounted drive may have no such guarantee to give
            raise
    finally:
        os.close(descriptor)
