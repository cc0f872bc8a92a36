"""The only place that publishes a file: written under a temporary name, fsynced, renamed, and the folder fsynced.

A name that does not start with a dot is therefore always whole, also after a kill or a power cut.
"""

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

from shards.errors import CorruptError, from_os_error


def make_folder(path: Path) -> Path:
    """Make `path` and its missing parents, each one durable in its own parent, and return it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)
    except OSError as error:
        raise from_os_error(error, path, "made") from error
    return path


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists: whose disk and permissions a new file would have."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def publish_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all, replacing what was there."""
    with AtomicFile(path) as out:
        out.write(data)
        out.publish()


def move(path: Path, to: Path) -> None:
    """Give a file or folder another name in the same folder, durably."""
    try:
        path.rename(to)
        _sync_folder(to.parent)
    except OSError as error:
        raise from_os_error(error, path, "moved") from error


def publish_file(temp: Path, path: Path) -> None:
    """Give the finished file `temp`, on the same disk, the name `path`, durably, replacing what was there."""
    try:
        _sync(temp)
        temp.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise from_os_error(error, path, "published") from error


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a file for reading; CorruptError when it is not a file with an end: a device, a pipe, a folder.

    Without `follow_links` also when its name is a link. Opening never waits, as that of a pipe would.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags if follow_links else flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise from_os_error(error, path, "opened") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptError(f"{path}: is not a regular file", "reading it could take for ever")
    return os.fdopen(descriptor, "rb")


def read_whole(path: Path, most: int, *, follow_links: bool = True) -> bytes:
    """The bytes of a file; CorruptError when there are more than `most`, before any is read."""
    with open_regular(path, follow_links=follow_links) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > most:
            raise CorruptError(f"{path}: {nbytes:,} bytes, such a file has at most {most:,}")
        try:
            return file.read()
        except OSError as error:
            raise from_os_error(error, path, "read") from error


@contextmanager
def locked(
    path: Path, when_held: Callable[[], None] = lambda: None, is_over: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold the lock file `path`, in a folder that exists, against other processes and threads.

    `when_held` is called when somebody else holds it: what it raises is raised, otherwise this waits, until `is_over`,
    which ends in a CancelledError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            when_held()
            while not lock.is_locked:
                if is_over():
                    raise CancelledError from None
                with suppress(Timeout):
                    lock.acquire(timeout=0.5)
    except OSError as error:  # Timeout is one, but what when_held raises is not
        raise from_os_error(error, path, "locked") from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise from_os_error(error, path, "read") from error


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of `name` left in `folder`. The caller holds the lock of whatever lives there."""
    for stale in folder.glob(f".{name}.*.tmp"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


class AtomicFile:
    """A file that appears under its name only through `publish()`; leaving the `with` block without it leaves nothing.

    The temporary name is unique to this writer, so two processes never write into the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temp = _temporary(path)
        try:
            self._file = self._temp.open("xb", buffering=1 << 20)
        except OSError as error:
            raise from_os_error(error, path, "written") from error

    def write(self, data: bytes | memoryview, at: int | None = None) -> None:
        """Append `data`, or overwrite the bytes that start `at` an offset."""
        try:
            if at is not None:
                self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            raise from_os_error(error, self.path, "written") from error

    def digest(self) -> str:
        """The sha256 of everything written so far, in hex."""
        try:
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, self.path, "written") from error
        return sha256_of(self._temp)

    def publish(self) -> None:
        """Make the file durable and visible under its name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temp.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise from_os_error(error, self.path, "published") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # closing flushes, and on a full disk that fails once more
            self._file.close()
        self._temp.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder so that a kill leaves it whole or gone; `sweep` removes the rest. OSErrors become ours."""
    temp = _temporary(folder)
    move(folder, temp)
    shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill with files; it takes the name `path` when the block ends, or vanishes if it raises."""
    temp = _temporary(path)
    try:
        temp.mkdir()
        yield temp
        mode = temp.stat().st_mode & 0o666  # what the umask leaves; some libraries make files for the owner alone
        for file in temp.iterdir():
            file.chmod(mode)
            _sync(file)
        _sync(temp)
        if path.exists():
            shutil.rmtree(path)
        temp.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise from_os_error(error, path, "written") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid():x}-{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name != "nt":  # Windows has no fsync of a folder; its rename is journalled
        _sync(path)
