"""The files of a corpus, each brought here when it is first asked for."""

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.corpus import hub
from prepare.corpus.download import Remote, download, matches, sweep_parts
from prepare.text.formats import bytes_per_token, kind_of
from shards.atomic import locked, make_folder, sweep
from shards.errors import CorruptError, NetworkError
from shards.manifest import CorpusRecord, SourceRecord
from shards.numbers import size
from shards.sharing.hub_access import is_offline
from shards.sharing.progress import Progress
from shards.sharing.retry import Note

try:
    import fcntl
except ImportError:  # Windows: nothing is deleted there
    fcntl = None  # type: ignore[assignment]

FILES_AHEAD = 2  # fetched while one is read; each over several connections


class FileState(NamedTuple):
    """What changes when a file does, and is read without reading it."""

    inode: int
    nbytes: int
    modified_ns: int
    changed_ns: int


def state_of(path: Path) -> FileState | None:
    """The file's state now; None when it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return FileState(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Corpus:
    """What to read: `sources[i]` describes a file, `path(i)` is where it is. These are local files, hashed by now.

    `states` are those of the files before they were hashed.
    """

    def __init__(
        self, record: CorpusRecord, sources: list[SourceRecord], paths: list[Path], states: list[FileState | None]
    ) -> None:
        self.record, self.sources = record, sources
        self.needed = len(sources)  # files, from the first on, that should be enough
        self._paths = paths
        self._states = states

    def path(self, i: int) -> Path:
        """File number `i`, with the bytes that `sources[i]` says."""
        return self._paths[i]

    def glance(self, i: int) -> Path | Remote:
        """Where file number `i` is, or is to be fetched from, by its size alone."""
        return self._paths[i]

    def confirm(self, i: int) -> None:
        """CorruptError unless file number `i` is still what it was when it was hashed."""
        path, source = self._paths[i], self.sources[i]
        if state_of(path) != self._states[i] and not matches(path, source.nbytes, source.digest):
            raise _changed(path, source)

    def release(self, i: int) -> None:
        """File number `i` is not needed any more."""

    def close(self) -> None:
        """End what is still being fetched ahead; what has come of it is kept."""


class HubCorpus(Corpus):
    """The pinned files of a Hub repository: where the user's own Hub cache has them, else fetched into `raw`.

    The next files come while one is read, unless `max_tokens` should be reached without them.
    """

    def __init__(
        self,
        record: CorpusRecord,
        sources: list[SourceRecord],
        raw: Path,
        locks: Path,
        *,
        max_tokens: int,
        keep: bool,
        note: Note,
    ) -> None:
        super().__init__(record, sources, [raw / source.name for source in sources], [])
        self._raw, self._locks, self._keep, self._note = raw, locks, keep, note
        tokens = np.cumsum([source.nbytes / _bytes_per_token(source.name) for source in sources])
        self.needed = min(len(sources), 1 + int(np.searchsorted(tokens, max_tokens or sys.maxsize)))
        self._progress = Progress(sum(source.nbytes for source in sources[: self.needed]), note)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(FILES_AHEAD)
        self._fetched: dict[int, Future[Path]] = {}
        self._released: set[int] = set()
        self._matched: dict[int, tuple[Path, FileState | None]] = {}
        self._index_of = {source.name: i for i, source in enumerate(sources)}
        self._reading: _Reading | None = None

    def path(self, i: int) -> Path:
        """See Corpus. From then on the next files are being fetched."""
        self._read()
        index = self._index_of.get(self.sources[i].name.removesuffix(".bin") + ".idx")
        if index is not None:
            self._start(index).result()
        found = self._start(i)
        for ahead in range(i + 1, min(i + 1 + FILES_AHEAD, self.needed)):
            if ahead not in self._released:
                self._start(ahead)
        return found.result()

    def glance(self, i: int) -> Path | Remote:
        """See Corpus."""
        for path in self._places(i):
            if path.is_file() and path.stat().st_size == self.sources[i].nbytes:
                return path
        return self._remote(i)

    def confirm(self, i: int) -> None:
        """See Corpus; of a file that this process asked for. What an earlier one sealed, and was killed before it
        confirmed, is taken as it is."""
        if i in self._matched:
            path, state = self._matched[i]
            if state_of(path) != state and not matches(path, self.sources[i].nbytes, self.sources[i].digest):
                raise _changed(path, self.sources[i])

    def release(self, i: int) -> None:
        """See Corpus. Unless raw files are kept, it is deleted; never from the user's own cache."""
        self._released.add(i)
        self._matched.pop(i, None)
        if not self._keep and self._read().is_alone():
            for path in (self._paths[i], self._paths[i].with_suffix(".idx")):
                path.unlink(missing_ok=True)
                sweep_parts(path)

    def close(self) -> None:
        """See Corpus."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if self._reading:
            self._reading.close()

    def _read(self) -> "_Reading":
        self._reading = self._reading or _Reading(self._lock(""))
        return self._reading

    def _start(self, i: int) -> Future[Path]:
        if i not in self._fetched:
            self._fetched[i] = self._pool.submit(self._fetch, i)
        return self._fetched[i]

    def _lock(self, what: str) -> Path:
        return make_folder(self._locks) / f"files-{self._raw.name}{what}.lock"

    def _remote(self, i: int) -> Remote:
        return hub.remote(self.record.details["repo"], self.record.details["commit"], self.sources[i])

    def _places(self, i: int) -> list[Path]:
        """Where file number `i` may be."""
        cached = hub.in_cache(self.record.details["repo"], self.record.details["commit"], self.sources[i].name)
        return [self._paths[i]] if cached is None else [cached, self._paths[i]]

    def _find(self, i: int) -> Path | None:
        """Where file number `i` is, with the right bytes."""
        for path in self._places(i):
            state = state_of(path)
            if matches(path, self.sources[i].nbytes, self.sources[i].digest):
                self._matched[i] = path, state
                return path
        return None

    def _fetch(self, i: int) -> Path:
        source, path = self.sources[i], self._paths[i]
        if (found := self._find(i)) is not None:
            self._progress.found(source.name, source.nbytes)
            if found == path and next(path.parent.glob(".*.part"), None):  # a kill came before they were removed
                with locked(self._lock(f".{i}"), is_over=self._stop.is_set):
                    sweep_parts(path)
            return found
        if is_offline():
            raise NetworkError(
                f"{source.name} of {self.record.details['repo']} is not here, and HF_HUB_OFFLINE is set",
                "",
                "unset HF_HUB_OFFLINE",
            )
        with locked(self._lock(f".{i}"), is_over=self._stop.is_set):  # two recipes may want the same file at once
            if self._find(i) is None:
                self._note(f"downloading {source.name}, {size(source.nbytes)}")
                sweep(make_folder(path.parent), path.name)
                download(self._remote(i), path, self._stop, self._note, self._progress.of(source.name, source.nbytes))
                self._matched[i] = path, state_of(path)
        return path


def _bytes_per_token(name: str) -> float:
    """Only what is fetched ahead depends on it."""
    return bytes_per_token(name) if kind_of(name) else 2.0


def _changed(path: Path, source: SourceRecord) -> CorruptError:
    return CorruptError(
        f"{path}: changed while it was read: it is no longer {source.nbytes:,} bytes with {source.digest}",
        "the shards would not be what the manifest says they were made from; they were not published",
        "run the same command again",
    )


class _Reading:
    """Says to other processes that the corpus's files are being read, until it is closed or the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Whether no other process is reading them now."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        """Read no more."""
        self._file.close()
