"""manifest.json: what a token folder holds and what it was made from. Written last; no clock, host or path in it.

Identical inputs give identical bytes. It may come from a stranger, so its schema is strict and its size bounded.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from shards.atomic import publish_bytes, read_whole
from shards.errors import ConfigError, CorruptError, RefusedError
from shards.header import Placement

MANIFEST = "manifest.json"
MAX_BYTES = 64 << 20  # of a manifest that is believed

T = TypeVar("T")
Split = Literal["train", "val"]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
Digest = Annotated[str, Meta(pattern="^(sha256:[0-9a-f]{64}|git:[0-9a-f]{40})\\Z")]
Xxh3 = Annotated[str, Meta(pattern="^[0-9a-f]{16}\\Z")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\Z")]
Words = Annotated[str, Meta(max_length=1000)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ShardRecord(_Record, frozen=True, kw_only=True):
    """One shard and its sidecar. `xxh3` is of the token bytes, the sha256s are of whole files.

    One without tokens is of 0 bytes and not on disk: llm.c stops at an empty file.
    """

    file: FileName
    tokens: Count
    documents: Count
    nbytes: Count
    max_id: Annotated[int, Meta(ge=-1, le=2**32 - 1)]
    sha256: Sha256
    xxh3: Xxh3
    docs_sha256: Sha256

    @property
    def sidecar(self) -> str:
        """The name of the file of document starts and hashes."""
        return self.file.removesuffix(".bin") + ".docs.npy"


class Counts(_Record, frozen=True, kw_only=True):
    """What became of a part's rows. Those that were not `dropped`, by reason, are documents."""

    rows: Count = 0
    dropped: dict[Words, Count] = {}
    repaired: Count = 0  # documents with lone surrogates or invalid UTF-8, replaced by U+FFFD
    literal_eot: Count = 0  # documents that hold the text of the end-of-text token, encoded as ordinary text
    text_bytes: Count = 0  # of UTF-8 in the documents

    def plus(self, other: "Counts") -> "Counts":
        """Both together."""
        reasons = [*self.dropped, *(reason for reason in other.dropped if reason not in self.dropped)]
        return Counts(
            rows=self.rows + other.rows,
            dropped={reason: self.dropped.get(reason, 0) + other.dropped.get(reason, 0) for reason in reasons},
            repaired=self.repaired + other.repaired,
            literal_eot=self.literal_eot + other.literal_eot,
            text_bytes=self.text_bytes + other.text_bytes,
        )


class PartRecord(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """A range of row groups (parquet) or bytes (jsonl) of one source file, and the two shards it became. With
    `last_source` a run of whole files up to that one; `first` and `last` are 0 then.
    """

    source: Count
    last_source: Count | None = None
    first: Count
    last: Count
    ends_source: bool  # nothing of the file comes after it
    counts: Counts
    train: ShardRecord
    val: ShardRecord

    @property
    def sources(self) -> range:
        """The numbers of the source files."""
        return range(self.source, 1 + max(self.source, self.last_source or 0))

    @property
    def shards(self) -> list[ShardRecord]:
        """Those that are on disk."""
        return [shard for shard in (self.train, self.val) if shard.nbytes]

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return sum(shard.tokens for shard in self.shards)


class SourceRecord(_Record, frozen=True, kw_only=True):
    """One file as it was read. `digest` is "sha256:…", or "git:…", the sha1 of its blob.

    `split` is where its documents went; null when each document's own hash decided.
    """

    name: Words
    nbytes: Count
    digest: Digest
    split: Split | None = None

    @property
    def has_parts(self) -> bool:
        """Whether there are documents in it: Megatron's index belongs to the file beside it."""
        return not self.name.endswith(".idx")


class CorpusRecord(_Record, frozen=True, kw_only=True):
    """Where the documents come from. `details` is the pinned commit, or the packages and their versions."""

    kind: Words
    name: Words
    text_column: Words
    details: dict[str, Words]


class CutRecord(_Record, frozen=True, kw_only=True):
    """How files are cut into parts: small ones together, large ones by how many bytes a sample of the text has a token.

    Both in thousandths of what English has: `scale` of text, `packed` of parquet files as they are on disk. Without a
    record each file is cut for itself, as English.
    """

    version: Literal[2] = 2
    scale: Annotated[int, Meta(ge=1, le=10**6)]
    packed: Annotated[int, Meta(ge=1, le=10**6)]


class TokenizerRecord(_Record, frozen=True, kw_only=True):
    """The folder's own tokenizer: `tokenizer.tiktoken` rules, `tokenizer.json` is the same for Hugging Face."""

    name: Words
    pattern: Literal["gpt2"]
    vocab_size: Annotated[int, Meta(ge=257, le=2**31 - 1)]
    eot: Count
    ranks_sha256: Sha256
    json_sha256: Sha256

    def __str__(self) -> str:
        return f"{self.name} ({self.vocab_size:,} tokens, sha256 {self.ranks_sha256[:12]}…)"


class Manifest(_Record, frozen=True, kw_only=True):
    """Everything a token folder holds.

    `filters` dropped what did not meet them, `dedup` every document that had come before, and `forbidden`, the sha256
    of a sorted list of hashes, those documents.
    """

    format: Literal["millpond-tokens-1"] = "millpond-tokens-1"
    fingerprint: Sha256
    corpus: CorpusRecord
    sources: list[SourceRecord]
    tokenizer: TokenizerRecord
    placement: Placement | None  # null: ready tokens, whose end-of-text is where their maker put it
    val_fraction: Annotated[float, Meta(ge=0, le=0.5)]
    filters: list[Words] = []
    dedup: bool = False
    forbidden: Sha256 | None = None
    part_tokens: Annotated[int, Meta(ge=1, le=2**30)]
    plan: CutRecord | UnsetType = UNSET
    parts: list[PartRecord]

    def __post_init__(self) -> None:
        for i, part in enumerate(self.parts):
            for split, shard in (("train", part.train), ("val", part.val)):
                if shard.file != f"{split}-{i:05}.bin":
                    raise ValueError(f"part {i} names {shard.file} as its {split} shard")
                if not shard.nbytes and (shard.tokens or shard.documents):
                    raise ValueError(f"{shard.file} has 0 bytes and {shard.tokens} tokens")
            if part.sources[-1] >= len(self.sources):
                raise ValueError(f"part {i} is of source {part.sources[-1]}, there are {len(self.sources)}")

    @property
    def complete(self) -> bool:
        """Whether no part of the corpus is left to prepare."""
        final = max((i for i, source in enumerate(self.sources) if source.has_parts), default=-1)
        return bool(self.parts) and self.parts[-1].ends_source and self.parts[-1].sources[-1] == final

    def shards(self, split: Split) -> list[ShardRecord]:
        """The split's shards that are on disk, in order; a part without tokens of it has none."""
        return [shard for part in self.parts if (shard := part.train if split == "train" else part.val).nbytes]

    def tokens(self, split: Split) -> int:
        """How many tokens the split has."""
        return sum(shard.tokens for shard in self.shards(split))

    def counted(self, part: PartRecord) -> int:
        """What a part adds to `max_tokens`: its tokens, but nothing when its file was given as validation."""
        return 0 if self.sources[part.source].split == "val" else part.tokens

    @property
    def counts(self) -> Counts:
        """The counts of all parts together."""
        total = Counts()
        for part in self.parts:
            total = total.plus(part.counts)
        return total

    def files(self) -> Iterator[tuple[str, str]]:
        """Every file the folder must hold beside the manifest, with its sha256."""
        yield "tokenizer.tiktoken", self.tokenizer.ranks_sha256
        yield "tokenizer.json", self.tokenizer.json_sha256
        for part in self.parts:
            for shard in part.shards:
                yield shard.file, shard.sha256
                yield shard.sidecar, shard.docs_sha256

    def write(self, folder: Path) -> None:
        """Publish the manifest: from here on the folder is what this says. RefusedError when it could not be read."""
        path, data = folder / MANIFEST, self.encoded(folder)
        decode(data, Manifest, path)
        publish_bytes(path, data)

    def encoded(self, folder: Path) -> bytes:
        """The bytes of the file; RefusedError when they are more than are read."""
        data = encode(self)
        if len(data) > MAX_BYTES:
            raise RefusedError(
                f"{folder / MANIFEST}: {len(self.sources):,} source files and {len(self.parts):,} parts take "
                f"{len(data):,} bytes, at most {MAX_BYTES:,} are read",
                "the folder could be written and never be opened",
                "join the files into fewer ones, or raise tokens.part_tokens",
            )
        return data

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of `folder`; ConfigError when there is none, CorruptError when it is not one."""
        path = folder / MANIFEST
        if not os.path.lexists(path):
            raise ConfigError(
                f"{path}: no such file",
                "a token folder is finished when its manifest exists",
                "millpond prepare CONFIG",
            )
        return decode(read_whole(path, MAX_BYTES, follow_links=False), cls, path)


def folder_name(corpus: str, fingerprint: str) -> str:
    """What a token folder is called: another recipe has another fingerprint, and so another folder."""
    return f"{corpus}-{fingerprint[:8]}"


def encode(record: msgspec.Struct) -> bytes:
    """Canonical JSON: fields in the order of the struct, other keys sorted, two spaces, one newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes, kind: type[T], path: Path) -> T:
    """`data` as a `kind`; whatever is wrong with it becomes one CorruptError that names `path`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptError(
            f"{path}: not a valid {kind.__name__}: {error}",
            "it was damaged or written by something else",
            "copy it again from where it came, or remove it and run the same command again",
        ) from error
