"""From a [corpus] table to files of text that are there, hashed and pinned.

A corpus is pinned once, in `lock.json` beside its files, so that a later run reads the same text. Local files are not
copied and have no lock: their hashes are taken each time, at the speed of the disk.
"""

import glob
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from filelock import FileLock

from prepare import hub, python_docs
from prepare.config import CorpusConfig
from prepare.documents import SUFFIXES
from prepare.download import download, matches
from shards.atomic import make_folder, publish_bytes, sha256_of, sweep
from shards.errors import ConfigError, CorruptError, NetworkError
from shards.manifest import CorpusRecord, SourceRecord, decode, encode

Note = Callable[[str], None]

COMPRESSED_BYTES_PER_TOKEN = 2.9  # of FineWeb's parquet files; only what is fetched ahead and shown depends on it

NAMED = {
    "fineweb-10bt": CorpusConfig(kind="hub", repo="HuggingFaceFW/fineweb", files=("sample/10BT/*.parquet",)),
    "fineweb-edu-10bt": CorpusConfig(kind="hub", repo="HuggingFaceFW/fineweb-edu", files=("sample/10BT/*.parquet",)),
    "python-docs": CorpusConfig(kind="python-docs"),
}


class Corpus(NamedTuple):
    """What to read: `path(i)` is the file that `sources[i]` describes, fetched first where it is not here yet.

    `close()` ends what is still being fetched ahead.
    """

    record: CorpusRecord
    sources: list[SourceRecord]
    path: Callable[[int], Path]
    close: Callable[[], None] = lambda: None


class _Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """lock.json: what was asked for, and what that was when it was asked for first."""

    asked: dict[str, str]
    record: CorpusRecord
    sources: list[SourceRecord]


def resolve(config: CorpusConfig) -> CorpusConfig:
    """The config with a named corpus filled in. ConfigError for an unknown name or a missing kind."""
    if config.kind == "hub" and not (config.repo and config.files):
        raise ConfigError(
            'corpus.kind is "hub", and corpus.repo or corpus.files is not set',
            "a dataset on the Hub is named by both",
            "--set corpus.repo=OWNER/NAME --set corpus.files=PATTERN",
        )
    if config.kind:
        return msgspec.structs.replace(config, name=config.name or _default_name(config))
    if config.name not in NAMED:
        raise ConfigError(
            f"corpus.name is {config.name!r}, known are {', '.join(sorted(NAMED))}",
            "any other corpus needs its kind as well",
            'set corpus.kind to "files" and corpus.files to your own texts',
        )
    named = NAMED[config.name]
    return msgspec.structs.replace(config, kind=named.kind, repo=named.repo, files=config.files or named.files)


def _default_name(config: CorpusConfig) -> str:
    return config.repo.replace("/", "--") if config.kind == "hub" else config.kind


def fetch(
    config: CorpusConfig, raw: Path, *, max_tokens: int = 0, force: bool = False, note: Note = lambda _: None
) -> Corpus:
    """Pin the corpus, or find what was pinned before; `force` pins anew what is there today.

    Files of the Hub come later, each when it is first asked for, and the next one while that is being read, unless
    `max_tokens` should be reached without it. `note` is told what takes long.
    """
    config = resolve(config)
    if config.kind == "files":
        return _local_files(config)
    asked = {"kind": config.kind, "repo": config.repo, "revision": config.revision, "files": " ".join(config.files)}
    lock_path = raw / "lock.json"
    lock = decode(lock_path.read_bytes(), _Lock, lock_path) if lock_path.exists() and not force else None
    if lock is None or lock.asked != asked:
        make_folder(raw)
        if config.kind == "hub":
            lock = _pin_hub(config, asked)
        else:
            note("collecting the documentation of the installed packages")
            lock = _pin_python_docs(config, asked, raw)
        publish_bytes(lock_path, encode(lock))
    if config.kind == "hub":
        files = _HubFiles(lock, raw, max_tokens or sys.maxsize, note)
        record = msgspec.structs.replace(lock.record, text_column=config.text_column)  # pinned are files, not columns
        return Corpus(record, lock.sources, files.path, files.close)
    return Corpus(lock.record, lock.sources, lambda i: _checked(raw, lock.sources[i]))


def _checked(raw: Path, source: SourceRecord) -> Path:
    path = raw / source.name
    if not matches(path, source.nbytes, source.digest):
        raise CorruptError(
            f"{path}: is not the {source.nbytes:,} bytes with {source.digest} that lock.json says",
            "the file changed since it was pinned",
            "millpond fetch CONFIG --force",
        )
    return path


class _HubFiles:
    """The pinned files of a Hub repository: where the user's own Hub cache has them, else under `raw`."""

    def __init__(self, lock: _Lock, raw: Path, max_tokens: int, note: Note) -> None:
        self._raw, self._note = raw, note
        tokens = np.cumsum([file.nbytes for file in lock.sources]) / COMPRESSED_BYTES_PER_TOKEN
        self._last_wanted = int(np.searchsorted(tokens, max_tokens))
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._fetched: dict[int, Future[Path]] = {}
        files = [hub.HubFile(path=file.name, size=file.nbytes, digest=file.digest) for file in lock.sources]
        self._repository = hub.Repository(
            repo=lock.record.details["repo"], commit=lock.record.details["commit"], files=files
        )

    def path(self, i: int) -> Path:
        """File number `i`, once its bytes are here and right; from then on the next one is being fetched."""
        path = self._start(i).result()
        if i < min(self._last_wanted, len(self._repository.files) - 1):
            self._start(i + 1)
        return path

    def close(self) -> None:
        """End what is being fetched ahead; what has come of it is kept."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _start(self, i: int) -> Future[Path]:
        if i not in self._fetched:
            self._fetched[i] = self._pool.submit(self._fetch, self._repository.files[i])
        return self._fetched[i]

    def _fetch(self, file: hub.HubFile) -> Path:
        for path in (hub.in_cache(self._repository, file), self._raw / file.path):
            if path is not None and matches(path, file.size, file.digest):
                return path
        if hub.is_offline():
            raise NetworkError(
                f"{file.path} of {self._repository.repo} is not here, and HF_HUB_OFFLINE is set",
                "",
                "unset HF_HUB_OFFLINE",
            )
        path = self._raw / file.path
        with FileLock(self._raw.with_name(f".{self._raw.name}.lock")):  # two recipes may want the same file at once
            if not matches(path, file.size, file.digest):
                self._note(f"downloading {file.path}, {file.size / 1e6:,.1f} MB")
                sweep(make_folder(path.parent))
                download(hub.remote(self._repository, file), path, self._stop)
        return path


def _local_files(config: CorpusConfig) -> Corpus:
    paths: set[Path] = set()
    for pattern in config.files:
        names = glob.glob(os.path.expanduser(pattern), recursive=True)  # noqa: PTH207, PTH111  (Path.glob takes no absolute pattern)
        found = [Path(name).absolute() for name in names]  # as named: what a link leads to may have no suffix
        for path in found:
            if not path.exists():
                raise ConfigError(f"{path}: is a link that leads nowhere", "", "mend or remove it")
            if not str(path).isprintable():
                raise ConfigError(f"{str(path)!r}: a file name that cannot be printed", "", "rename it")
        files = [path for path in found if path.is_file()]
        if not files:
            raise ConfigError(
                f"corpus.files: no file matches {pattern!r} (looked from {Path.cwd()})", "", "check the path"
            )
        paths.update(files)
    if not paths:
        raise ConfigError("corpus.files is empty", 'a corpus of kind "files" needs them', "--set corpus.files=PATTERN")
    for path in sorted(paths):
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(
                f"{path}: unknown kind of file", f"text is read from {', '.join(SUFFIXES)}", "convert or rename it"
            )
    root = Path(os.path.commonpath([path.parent for path in paths]))
    ordered = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_of, ordered))
    sources = [
        SourceRecord(name=path.relative_to(root).as_posix(), nbytes=path.stat().st_size, digest=f"sha256:{sha256}")
        for path, sha256 in zip(ordered, hashes, strict=True)
    ]
    record = CorpusRecord(kind="files", name=config.name, text_column=config.text_column, details={})
    return Corpus(record, sources, ordered.__getitem__)


def _pin_hub(config: CorpusConfig, asked: dict[str, str]) -> _Lock:
    found = hub.resolve(config.repo, config.revision, config.files)
    for file in found.files:
        if file.path.startswith("/") or ".." in file.path.split("/"):
            raise CorruptError(
                f"{config.repo}: {file.path!r} leads out of its folder", "such a listing is not believed"
            )
        if not file.path.endswith(SUFFIXES):
            raise ConfigError(
                f"{config.repo}: {file.path}: unknown kind of file",
                f"text is read from {', '.join(SUFFIXES)}",
                "choose others with corpus.files",
            )
    return _Lock(
        asked=asked,
        record=CorpusRecord(
            kind="hub",
            name=config.name,
            text_column=config.text_column,
            details={"repo": found.repo, "commit": found.commit},
        ),
        sources=[SourceRecord(name=file.path, nbytes=file.size, digest=file.digest) for file in found.files],
    )


def _pin_python_docs(config: CorpusConfig, asked: dict[str, str], raw: Path) -> _Lock:
    packages = python_docs.installed()
    path = raw / "python-docs.parquet"
    publish_bytes(path, python_docs.collect(packages))
    return _Lock(
        asked=asked,
        record=CorpusRecord(
            kind="python-docs",
            name=config.name,
            text_column="text",
            details={name: package.version for name, package in packages.items()},
        ),
        sources=[SourceRecord(name=path.name, nbytes=path.stat().st_size, digest=f"sha256:{sha256_of(path)}")],
    )
