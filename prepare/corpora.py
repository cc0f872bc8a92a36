"""From a [corpus] table to files of text that are there, hashed and pinned.

A corpus is pinned once, in `lock.json` beside its files, so that a later run reads the same text. Local files are not
copied and have no lock: their hashes are taken each time, at the speed of the disk.
"""

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from prepare import python_docs
from prepare.config import CorpusConfig
from prepare.documents import SUFFIXES
from shards.atomic import make_folder, publish_bytes, sha256_of
from shards.errors import ConfigError, CorruptError, RefusedError
from shards.manifest import CorpusRecord, SourceRecord, decode, encode

NAMED = {
    "fineweb-10bt": CorpusConfig(kind="hub", repo="HuggingFaceFW/fineweb", files=("sample/10BT/*.parquet",)),
    "fineweb-edu-10bt": CorpusConfig(kind="hub", repo="HuggingFaceFW/fineweb-edu", files=("sample/10BT/*.parquet",)),
    "python-docs": CorpusConfig(kind="python-docs"),
}


class Corpus(NamedTuple):
    """What to read: `paths[i]` is the file that `sources[i]` describes."""

    record: CorpusRecord
    sources: list[SourceRecord]
    paths: list[Path]


class _Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    record: CorpusRecord
    sources: list[SourceRecord]


def resolve(config: CorpusConfig) -> CorpusConfig:
    """The config with a named corpus filled in. ConfigError for an unknown name or a missing kind."""
    if config.kind:
        return msgspec.structs.replace(config, name=config.name or config.kind)
    if config.name not in NAMED:
        raise ConfigError(
            f"corpus.name is {config.name!r}, known are {', '.join(sorted(NAMED))}",
            "any other corpus needs its kind as well",
            'set corpus.kind to "files" and corpus.files to your own texts',
        )
    named = NAMED[config.name]
    return msgspec.structs.replace(config, kind=named.kind, repo=named.repo, files=config.files or named.files)


def fetch(config: CorpusConfig, raw: Path, *, force: bool = False) -> Corpus:
    """Make sure the corpus's files are on disk and are what was pinned. `force` pins anew what is there today."""
    config = resolve(config)
    if config.kind == "files":
        return _local_files(config)
    if config.kind == "hub":
        raise RefusedError(
            f"corpus {config.name or config.repo}: the Hub download arrives with prepare's download stage",
            "this version reads local files and the documentation of installed packages",
            'download the parquet files, then set corpus.kind = "files" and corpus.files',
        )
    lock_path = raw / "lock.json"
    if force or not lock_path.exists():
        return _python_docs(config, raw)
    lock = decode(lock_path.read_bytes(), _Lock, lock_path)
    return Corpus(lock.record, lock.sources, [_checked(raw, source) for source in lock.sources])


def _checked(raw: Path, source: SourceRecord) -> Path:
    path = raw / source.name
    found = sha256_of(path)
    if found != source.sha256:
        raise CorruptError(
            f"{path}: sha256 is {found}, lock.json says {source.sha256}",
            "the file changed since it was pinned",
            "millpond fetch --force",
        )
    return path


def _local_files(config: CorpusConfig) -> Corpus:
    paths: set[Path] = set()
    for pattern in config.files:
        matches = [Path(name).resolve() for name in glob.glob(os.path.expanduser(pattern), recursive=True)]  # noqa: PTH207, PTH111  (absolute patterns; Path.glob takes none)
        if not matches:
            raise ConfigError(
                f"corpus.files: no file matches {pattern!r} (looked from {Path.cwd()})", "", "check the path"
            )
        paths.update(path for path in matches if path.is_file())
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
        SourceRecord(name=path.relative_to(root).as_posix(), nbytes=path.stat().st_size, sha256=sha256)
        for path, sha256 in zip(ordered, hashes, strict=True)
    ]
    record = CorpusRecord(kind="files", name=config.name, text_column=config.text_column, details={})
    return Corpus(record, sources, ordered)


def _python_docs(config: CorpusConfig, raw: Path) -> Corpus:
    make_folder(raw)
    packages = python_docs.installed()
    path = raw / "python-docs.parquet"
    publish_bytes(path, python_docs.collect(packages))
    source = SourceRecord(name=path.name, nbytes=path.stat().st_size, sha256=sha256_of(path))
    versions = {name: package.version for name, package in packages.items()}
    record = CorpusRecord(kind="python-docs", name=config.name, text_column="text", details=versions)
    publish_bytes(raw / "lock.json", encode(_Lock(record=record, sources=[source])))
    return Corpus(record, [source], [path])
