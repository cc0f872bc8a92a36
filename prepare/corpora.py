"""From a [corpus] table to files of text that are there, hashed and pinned.

A corpus is pinned once, in `lock.json` beside its files, so that a later run reads the same text. Local files are not
copied and have no lock: their hashes are taken each time, at the speed of the disk.
"""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from prepare import hub, python_docs
from prepare.config import CorpusConfig
from prepare.download import Note, matches
from prepare.rows import COMPRESSED, SUFFIXES, kind_of
from prepare.screen import parse_filters
from prepare.sources import Corpus, HubCorpus, state_of
from shards.atomic import make_folder, publish_bytes, read_whole, sha256_of
from shards.errors import ConfigError, CorruptError, RefusedError
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.manifest import MAX_BYTES, CorpusRecord, SourceRecord, Split, decode, encode


def _fineweb(repo: str, files: str) -> CorpusConfig:
    return CorpusConfig(kind="hub", repo=f"HuggingFaceFW/{repo}", files=(f"{files}/*.parquet",))


def _tokens(repo: str, stem: str) -> CorpusConfig:
    return CorpusConfig(kind="hub", repo=repo, files=(f"{stem}_train_*.bin",), val_files=(f"{stem}_val_*.bin",))


NAMED = {
    **{
        f"{repo}-{size.lower()}": _fineweb(repo, f"sample/{size}")
        for repo in ("fineweb", "fineweb-edu")
        for size in ("10BT", "100BT", "350BT")
    },
    # llm.c's shards as others made and measured with them (KellerJordan/modded-nanogpt, data/cached_*.py)
    "fineweb10b-gpt2": _tokens("kjj0/fineweb10B-gpt2", "fineweb"),
    "fineweb100b-gpt2": _tokens("kjj0/fineweb100B-gpt2", "fineweb"),
    "finewebedu10b-gpt2": _tokens("kjj0/finewebedu10B-gpt2", "finewebedu"),
    "python-docs": CorpusConfig(kind="python-docs"),
}
_DUMP = re.compile(r"(fineweb(?:-edu)?)-(CC-MAIN-\d{4}-\d{2})")  # one crawl: fineweb-CC-MAIN-2024-10


class _Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """lock.json: what was asked for, and what that was when it was asked for first."""

    asked: dict[str, str]
    record: CorpusRecord
    sources: list[SourceRecord]


def resolve(config: CorpusConfig) -> CorpusConfig:
    """The config with a named corpus filled in. ConfigError for an unknown name or a missing kind."""
    parse_filters(config.filters)
    if config.kind == "hub" and not (config.repo and config.files):
        raise ConfigError(
            'corpus.kind is "hub", and corpus.repo or corpus.files is not set',
            "a dataset on the Hub is named by both",
            "--set corpus.repo=OWNER/NAME --set corpus.files=PATTERN",
        )
    if config.kind:
        return msgspec.structs.replace(config, name=config.name or _default_name(config))
    dump = _DUMP.fullmatch(config.name)
    if config.name not in NAMED and not dump:
        raise ConfigError(
            f"corpus.name is {config.name!r}, known are {', '.join(sorted(NAMED))}, and crawls as "
            "fineweb-CC-MAIN-2024-10",
            "any other corpus needs its kind as well",
            'set corpus.kind to "files" and corpus.files to your own texts',
        )
    named = _fineweb(dump[1], f"data/{dump[2]}") if dump else NAMED[config.name]
    own = ("repo",) if named.kind == "hub" else ("repo", "files", "val_files")
    if ignored := [field for field in own if getattr(config, field)]:
        raise ConfigError(
            f"corpus.{ignored[0]} is set, and corpus.name is {config.name!r}, which has its own",
            "it would be ignored",
            'leave it out, or set corpus.kind = "hub" and another name',
        )
    return msgspec.structs.replace(
        config,
        kind=named.kind,
        repo=named.repo,
        files=config.files or named.files,
        val_files=config.val_files or named.val_files,
    )


def _default_name(config: CorpusConfig) -> str:
    return config.repo.replace("/", "--") if config.kind == "hub" else config.kind


def fetch(
    config: CorpusConfig,
    raw: Path,
    *,
    locks: Path | None = None,
    max_tokens: int = 0,
    force: bool = False,
    note: Note = lambda _: None,
) -> Corpus:
    """Pin the corpus, or find what was pinned before; `force` pins anew what is there today.

    Files of the Hub come later, each when it is first asked for, and the next ones while that is being read, unless
    `max_tokens` should be reached without them. `note` is told what takes long; `locks` is the folder where processes
    that want the same file find each other.
    """
    config = resolve(config)
    if config.kind == "files":
        return _local_files(config)
    asked = {
        "kind": config.kind,
        "repo": config.repo,
        "revision": config.revision,
        "files": " ".join(config.files),
        "val_files": " ".join(config.val_files),
    }
    lock_path = raw / "lock.json"
    lock = _read_lock(lock_path) if lock_path.exists() and not force else None
    if lock is not None and lock.asked != asked:
        differing = ", ".join(key for key in asked if lock.asked.get(key) != asked[key])
        raise RefusedError(
            f"{lock_path}: corpus {config.name} is pinned with another {differing}",
            "what was prepared from it could not grow any more",
            "choose another corpus.name, or pin it anew: millpond fetch CONFIG --force",
        )
    if lock is None:
        make_folder(raw)
        if config.kind == "hub":
            lock = _pin_hub(config, asked)
        else:
            note("collecting the documentation of the installed packages")
            lock = _pin_python_docs(config, asked, raw)
        publish_bytes(lock_path, encode(lock))
    if config.kind == "hub":
        # pinned are files, not what they are called and which column is read
        record = msgspec.structs.replace(lock.record, name=config.name, text_column=config.text_column)
        locks = locks or raw.with_name("locks")
        return HubCorpus(record, lock.sources, raw, locks, max_tokens=max_tokens, keep=config.keep_raw, note=note)
    paths = [raw / source.name for source in lock.sources]
    states = [*map(state_of, paths)]
    for source in lock.sources:
        if not matches(raw / source.name, source.nbytes, source.digest):
            raise CorruptError(
                f"{raw / source.name}: is not the {source.nbytes:,} bytes with {source.digest} that lock.json says",
                "the file changed since it was pinned",
                "millpond fetch CONFIG --force",
            )
    return Corpus(lock.record, lock.sources, paths, states)


def _read_lock(path: Path) -> _Lock:
    """CorruptError when it could not have been written here."""
    lock = decode(read_whole(path, MAX_BYTES), _Lock, path)
    details, strays = lock.record.details, [file.name for file in lock.sources if _leads_out(file.name)]
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", details.get("repo", "")) and re.fullmatch(
        "[0-9a-f]{40}", details.get("commit", "")
    )
    if strays or not lock.sources or (lock.asked.get("kind") == "hub" and not is_hub):
        raise CorruptError(
            f"{path}: pins what cannot be: {strays[0] if strays else details}",
            "it says which files are fetched, and from where",
            "millpond fetch CONFIG --force",
        )
    return lock


def _leads_out(name: str) -> bool:
    """Whether a source's name is no path inside a folder."""
    return name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))


def _local_files(config: CorpusConfig) -> Corpus:
    paths: dict[Path, Split | None] = dict.fromkeys(_found(config.files), "train" if config.val_files else None)
    paths |= dict.fromkeys(_found(config.val_files), "val")
    if not paths:
        raise ConfigError("corpus.files is empty", 'a corpus of kind "files" needs them', "--set corpus.files=PATTERN")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    _require_readable([path.relative_to(root).as_posix() for path in paths], str(root))
    ordered = sorted(paths, key=lambda path: (paths[path] != "val", path.relative_to(root).as_posix()))
    states = [*map(state_of, ordered)]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_of, ordered))
    sources = [
        SourceRecord(
            name=path.relative_to(root).as_posix(),
            nbytes=path.stat().st_size,
            digest=f"sha256:{sha256}",
            split=paths[path],
        )
        for path, sha256 in zip(ordered, hashes, strict=True)
    ]
    record = CorpusRecord(kind="files", name=config.name, text_column=config.text_column, details={})
    return Corpus(record, sources, ordered, states)


def _found(patterns: tuple[str, ...]) -> set[Path]:
    """The local files that match, Megatron's index beside its tokens included."""
    paths: set[Path] = set()
    for pattern in patterns:
        plain = Path(pattern).expanduser()
        names = [str(plain)] if plain.is_file() else glob.glob(str(plain), recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
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
    return paths | {index for path in paths if (index := path.with_suffix(".idx")).is_file() and path.suffix == ".bin"}


def _require_readable(names: list[str], where: str) -> None:
    """ConfigError unless all files are text, or all are tokens."""
    tokens = [name for name in names if name.endswith((*TOKEN_SUFFIXES, ".idx"))]
    for name in names:
        if not kind_of(name) and name not in tokens:
            raise ConfigError(
                f"{where}: {name}: unknown kind of file",
                f"text is read from {', '.join(SUFFIXES)} (also {', '.join(COMPRESSED)}), tokens from "
                f"{', '.join(TOKEN_SUFFIXES)}",
                "choose others with corpus.files, or convert it",
            )
    if 0 < len(tokens) < len(names):
        raise ConfigError(
            f"{where}: some files are text and some are tokens, as {tokens[0]} is",
            "a token folder is made from the one or from the other",
            "choose with corpus.files",
        )


def _pin_hub(config: CorpusConfig, asked: dict[str, str]) -> _Lock:
    patterns = config.files + config.val_files
    indexes = tuple(pattern.removesuffix(".bin") + ".idx" for pattern in patterns if pattern.endswith(".bin"))
    found = hub.resolve(config.repo, config.revision, patterns, indexes)
    for file in found.files:
        if _leads_out(file.name):
            raise CorruptError(
                f"{config.repo}: {file.name!r} leads out of its folder", "such a listing is not believed"
            )
    _require_readable([file.name for file in found.files], config.repo)
    sources = found.files
    if config.val_files:
        of_val = (*config.val_files, *(f"{pattern.removesuffix('.bin')}.idx" for pattern in config.val_files))
        is_val = {file.name: any(fnmatchcase(file.name, pattern) for pattern in of_val) for file in sources}
        sources = [msgspec.structs.replace(file, split="val" if is_val[file.name] else "train") for file in sources]
        sources.sort(key=lambda file: file.split != "val")
    details = {"repo": config.repo, "commit": found.commit}
    if found.licence:
        details["licence"] = found.licence
    return _Lock(
        asked=asked,
        record=CorpusRecord(kind="hub", name=config.name, text_column=config.text_column, details=details),
        sources=sources,
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
