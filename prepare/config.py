"""The [corpus] and [tokens] tables of a recipe: everything that determines a token folder."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shards.header import Placement

NOT_IDENTITY = {"identity": False}  # marks a field that cannot change the result, so it stays out of the fingerprint


class CorpusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the text comes from: a `name` known to corpora.py, or a `kind` and what that kind needs."""

    name: Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?\Z", max_length=60)] = ""
    kind: Literal["", "hub", "files", "python-docs"] = ""
    repo: str = ""
    revision: str = "main"
    files: tuple[str, ...] = ()
    text_column: Annotated[str, Meta(max_length=200)] = "text"


class TokensConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the text becomes tokens."""

    tokenizer: Literal["gpt2", "bpe"] = "gpt2"
    vocab_size: Annotated[int, Meta(ge=0, le=2**20)] = 0  # for "bpe", end-of-text included
    max_tokens: Annotated[int, Meta(ge=0, le=2**50, extra=NOT_IDENTITY)] = 0  # 0 = the whole corpus
    val_fraction: Annotated[float, Meta(ge=0, le=0.5)] = 0.005
    eot: Placement = "before"
    part_tokens: Annotated[int, Meta(ge=1000, le=2**30)] = 100_000_000
    engine: Annotated[Literal["fastokens", "tiktoken"], Meta(extra=NOT_IDENTITY)] = "fastokens"
    workers: Annotated[int, Meta(ge=0, le=1024, extra=NOT_IDENTITY)] = 0  # 0 = one per core
