"""From a [corpus] table to files of text that are there, hashed and pinned.

A corpus is pinned once, in `lock.json` beside its files, so that a later run reads the same text. Local files are not
copied and have no lock: their hashes are taken each time, at the speed of the disk.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import assert_never

import msgspec

from prepare.config import CorpusConfig
from prepare.corpus import hub, python_docs
from prepare.corpus.corpus import Corpus, HubCorpus, state_of
from prepare.corpus.download import matches
from prepare.corpus.files import Found, fixed_folder, listed_files, local_files
from prepare.corpus.repo import REPO, parse_repo
from prepare.text.filters import parse_filters
from prepare.text.formats import kind_of, unknown
from shards.atomic import make_folder, publish_bytes, read_whole, sha256_of
from shards.errors import ConfigError, CorruptError, RefusedError
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.manifest import MAX_BYTES, CorpusRecord, SourceRecord, Split, decode, encode
from shards.sharing.retry import Note


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
_UNSET = CorpusConfig()
MAX_NAME = 1000  # characters of a source's name: shards.manifest.Words
_DUMP = re.compile(r"(fineweb(?:-edu)?)-(CC-MAIN-\d{4}-\d{2})")  # one crawl: fineweb-CC-MAIN-2024-10


class _Lock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """lock.json: what was asked for, and what that was when it was asked for first."""

    asked: dict[str, str]
    record: CorpusRecord
    sources: list[SourceRecord]


def resolve(config: CorpusConfig) -> CorpusConfig:
    """The config with a named corpus filled in, and its repository as OWNER/NAME. ConfigError for an unknown name or a
    missing kind."""
    parse_filters(config.filters)
    if config.kind == "hub":
        config = _placed(config)
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
    unset = [name for name in config.__struct_fields__ if getattr(config, name) == getattr(_UNSET, name)]
    return msgspec.structs.replace(config, **{name: getattr(named, name) for name in unset if name != "name"})


def _placed(config: CorpusConfig) -> CorpusConfig:
    """The config with what its repo says of a revision, a folder or a file in their own fields."""
    place = parse_repo(config.repo) if config.repo else None
    if place and place.revision and config.revision not in (_UNSET.revision, place.revision):
        raise ConfigError(
            f"corpus.repo names revision {place.revision!r} and corpus.revision is {config.revision!r}",
            "only one of the two can be read",
            "leave one of them out",
        )
    if place and place.is_file and config.files:
        raise ConfigError(
            f"corpus.repo names the file {place.path!r}, and corpus.files is set as well",
            "one of them would be ignored",
            f"--set corpus.repo={place.repo}",
        )
    if place:
        inside, files, val_files = f"{place.path}/", config.files, config.val_files
        if place.path and not place.is_file:
            files = tuple(each if each.startswith(inside) else inside + each for each in files or ("**/*.parquet",))
            val_files = tuple(each if each.startswith(inside) else inside + each for each in val_files)
        elif place.path:
            files = (place.path,)
        revision = place.revision or config.revision
        config = msgspec.structs.replace(config, repo=place.repo, revision=revision, files=files, val_files=val_files)
    if not (config.repo and config.files):
        raise ConfigError(
            'corpus.kind is "hub", and corpus.repo or corpus.files is not set',
            "a dataset on the Hub needs both",
            "--set corpus.repo=OWNER/NAME --set corpus.files=PATTERN",
        )
    return config


def _default_name(config: CorpusConfig) -> str:
    return config.repo.replace("/", "--") if config.kind == "hub" else config.kind


def pin(
    config: CorpusConfig,
    raw: Path,
    *,
    locks: Path | None = None,
    max_tokens: int = 0,
    force: bool = False,
    note: Note = lambda _: None,
) -> Corpus:
    """Pin the corpus, or find what was pinned before; `force` pins what is there today.

    Files of the Hub come later, each when it is first asked for, and the next ones while that is being read, unless
    `max_tokens` should be reached without them. `note` is told what takes long; `locks` is the folder where processes
    that want the same file find each other.
    """
    config = resolve(config)
    if config.kind == "files":
        return _local_files(config, note)
    asked = {
        "kind": config.kind,
        "repo": config.repo,
        "revision": config.revision,
        "files": _joined(config.files),
        "val_files": _joined(config.val_files),
    }
    lock_path = raw / "lock.json"
    lock = _read_lock(lock_path) if lock_path.exists() and not force else None
    earlier = asked | {"files": " ".join(config.files), "val_files": " ".join(config.val_files)}
    if lock is not None and lock.asked not in (asked, earlier):
        differing = ", ".join(key for key in asked if lock.asked.get(key) != asked[key])
        raise RefusedError(
            f"{lock_path}: corpus {config.name} is pinned with another {differing}",
            "what was prepared from it could not grow any more",
            "choose another corpus.name, or pin it again: millpond fetch CONFIG --force",
        )
    if lock is None:
        make_folder(raw)
        match config.kind:
            case "hub":
                lock = _pin_hub(config, asked)
            case "python-docs":
                note("collecting the documentation of the installed packages")
                lock = _pin_python_docs(config, asked, raw)
            case "":
                raise AssertionError("resolve has seen to it")
            case _:
                assert_never(config.kind)
        _publish_lock(lock_path, lock)
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


def is_pinned(config: CorpusConfig, raw: Path) -> bool:
    """Whether `pin` need not ask the Hub or collect anything."""
    return config.kind == "files" or (raw / "lock.json").exists()


def _joined(patterns: tuple[str, ...]) -> str:
    """The patterns as the lock has them: with spaces between, or as JSON where one has a space of its own."""
    return msgspec.json.encode(patterns).decode() if any(" " in each for each in patterns) else " ".join(patterns)


def _read_lock(path: Path) -> _Lock:
    return _believed(decode(read_whole(path, MAX_BYTES), _Lock, path), path)


def _publish_lock(path: Path, lock: _Lock) -> None:
    """What would be refused when it is read again is not written."""
    data = encode(_believed(lock, path))
    if len(data) > MAX_BYTES:
        raise RefusedError(
            f"{path}: a list of {len(lock.sources):,} files takes {len(data):,} bytes, at most {MAX_BYTES:,} are read",
            "the corpus could be pinned and never be read again",
            "choose fewer files with corpus.files",
        )
    publish_bytes(path, data)


def _believed(lock: _Lock, path: Path) -> _Lock:
    """The lock; CorruptError when it could not have been written here."""
    details, strays = lock.record.details, [file.name for file in lock.sources if _leads_out(file.name)]
    is_hub = REPO.fullmatch(details.get("repo", "")) and re.fullmatch("[0-9a-f]{40}", details.get("commit", ""))
    if strays or not lock.sources or (lock.asked.get("kind") == "hub" and not is_hub):
        raise CorruptError(
            f"{path}: is not a valid lock: {strays[0] if strays else details}",
            "it says which files are fetched, and from where",
            "millpond fetch CONFIG --force",
        )
    return lock


def _leads_out(name: str) -> bool:
    """Whether a source's name is no path inside a folder."""
    return name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))


def local_files_of(config: CorpusConfig) -> tuple[Found, Found]:
    """The local files that `files` and `val_files` name."""
    files = local_files(config.files, "corpus.files", _format_of)
    return files, local_files(config.val_files, "corpus.val_files", _format_of)


def _local_files(config: CorpusConfig, note: Note) -> Corpus:
    if not config.files:
        raise ConfigError("corpus.files is empty", 'a corpus of kind "files" needs them', "--set corpus.files=PATTERN")
    found, val = local_files_of(config)
    again = [path for path in found.again if path not in val.files.values()] + val.again
    if again:
        note(f"{len(again):,} more paths lead to files that are read once: {again[0]}{', ...' if again[1:] else ''}")
    splits: dict[Path, Split | None] = {
        path: "train" if config.val_files else None for inode, path in found.files.items() if inode not in val.files
    }
    if not splits:
        raise _all_validation()
    splits |= dict.fromkeys(val.files.values(), "val")
    indexes = {path.with_suffix(".idx"): split for path, split in splits.items() if path.suffix == ".bin"}
    splits |= {index: split for index, split in indexes.items() if index.is_file()}  # Megatron's, beside its tokens
    root = Path(os.path.commonpath([path.parent for path in splits]))
    names = {path: path.relative_to(root).as_posix() for path in splits}
    _require_readable([*names.values()], str(root))
    ordered = sorted(splits, key=lambda path: (splits[path] != "val", names[path]))
    states = [*map(state_of, ordered)]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_of, ordered))
    sources = [
        SourceRecord(name=names[path], nbytes=path.stat().st_size, digest=f"sha256:{sha256}", split=splits[path])
        for path, sha256 in zip(ordered, hashes, strict=True)
    ]
    record = CorpusRecord(kind="files", name=config.name, text_column=config.text_column, details={})
    return Corpus(record, sources, ordered, states)


def _all_validation() -> ConfigError:
    return ConfigError(
        "corpus.files: every file is among corpus.val_files too, where it is validation",
        "nothing is left to train on",
        "name other files for one of them",
    )


def _format_of(name: str) -> str:
    """The suffix of what text or tokens can be read from, "" for others."""
    return kind_of(name) or next((suffix for suffix in TOKEN_SUFFIXES if name.endswith(suffix)), "")


def _require_readable(names: list[str], where: str) -> None:
    """ConfigError unless all files are text, or all are tokens."""
    tokens = [name for name in names if name.endswith((*TOKEN_SUFFIXES, ".idx"))]
    for name in names:
        if len(name) > MAX_NAME:
            raise ConfigError(
                f"{where}: {name[:60]}...: a name of {len(name):,} characters, at most {MAX_NAME:,} can be kept",
                "the lock and the manifest could be written and never be read again",
                "shorten it, or choose others with corpus.files",
            )
        if not kind_of(name) and name not in tokens:
            raise unknown(f"{where}: ", name)
    if 0 < len(tokens) < len(names):
        raise ConfigError(
            f"{where}: some files are text and some are tokens, as {tokens[0]} is",
            "a token folder is made from the one or from the other",
            "choose with corpus.files",
        )


def _pin_hub(config: CorpusConfig, asked: dict[str, str]) -> _Lock:
    found = hub.listing(config.repo, config.revision, {fixed_folder(each) for each in config.files + config.val_files})
    for name in found.files:
        if _leads_out(name):
            raise CorruptError(f"{config.repo}: {name!r} is outside of its folder", "such a listing is not used")
    where = f"{config.repo} at {found.commit}"
    val = listed_files(config.val_files, "corpus.val_files", found.files, where, _format_of)
    names = val | listed_files(config.files, "corpus.files", found.files, where, _format_of)
    if names == val:
        raise _all_validation()
    _require_readable(sorted(names), config.repo)
    sources = [found.files[name] for name in sorted(names)]
    if config.val_files:
        sources = [msgspec.structs.replace(file, split="val" if file.name in val else "train") for file in sources]
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
