"""The [corpus] and [tokens] tables of a recipe: everything that determines a token folder."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shards.errors import ConfigError
from shards.fingerprint import NOT_IDENTITY
from shards.header import Placement

Executor = Literal["local", "ray"]
TOKENIZERS = ("gpt2", "bpe")
TOKENIZER_FILES = (".tiktoken", ".json")
MIN_VOCAB = 256 + 1 + 1  # of a trained one: the bytes, one merge and end-of-text


class CorpusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the text comes from: a `name` known to corpus/pin.py, or a `kind` and what that kind needs.

    With `val_files` the split is given: their documents are validation, all others are not. Without, each document's
    hash decides. `filters` are conditions that a row must meet: `int_score >= 3`, `len(text) >= 200`.
    """

    name: Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?\Z", max_length=60)] = (
        ""  # a named corpus, or what yours is called
    )
    kind: Literal["", "hub", "files", "python-docs"] = ""  # unset for a named corpus
    repo: str = ""  # hub: OWNER/NAME, or the address of its page
    revision: str = "main"  # hub: a branch, tag or commit, pinned to a commit
    files: tuple[str, ...] = ()  # paths or patterns
    val_files: tuple[str, ...] = ()  # validation, and nothing else
    text_column: Annotated[str, Meta(max_length=200)] = "text"  # the column or field of the documents
    filters: tuple[Annotated[str, Meta(max_length=200)], ...] = ()  # conditions that a row must meet
    keep_raw: Annotated[bool, Meta(extra=NOT_IDENTITY)] = True  # false: a fetched file goes when its parts are sealed


class TokensConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the text becomes tokens."""

    folder: Annotated[str, Meta(extra=NOT_IDENTITY)] = ""  # a token folder that is there, used as it is
    mix: Annotated[dict[str, float], Meta(extra=NOT_IDENTITY)] = {}  # or several, each with its weight
    tokenizer: str = "gpt2"  # "gpt2", "bpe" (trained on the corpus), or the path of a tokenizer file
    vocab_size: Annotated[int, Meta(ge=0, le=2**20)] = 0  # for "bpe", end-of-text included
    max_tokens: Annotated[int, Meta(ge=0, le=2**50, extra=NOT_IDENTITY)] = 0  # 0 = the whole corpus
    val_fraction: Annotated[float, Meta(ge=0, le=0.5)] = 0.005  # of the documents, chosen by their hash
    eot: Placement = "before"  # where end-of-text is, seen from its document
    dedup: bool = False  # of equal documents the first is kept
    forbid: Annotated[tuple[str, ...], Meta(extra=NOT_IDENTITY)] = ()  # token folders: their validation stays out;
    # what is identity is the list of hashes, not where it came from
    part_tokens: Annotated[int, Meta(ge=1000, le=2**30)] = 100_000_000  # about, in one training shard
    engine: Annotated[Literal["fastokens", "tiktoken"], Meta(extra=NOT_IDENTITY)] = "fastokens"  # same ids
    executor: Annotated[Executor, Meta(extra=NOT_IDENTITY)] = "local"  # processes here, or a Ray cluster
    workers: Annotated[int, Meta(ge=0, le=1024, extra=NOT_IDENTITY)] = 0  # 0 = one per core


def require_tokenizer(tokens: TokensConfig) -> None:
    """ConfigError when `tokens.tokenizer` names no tokenizer, or `tokens.vocab_size` does not fit it."""
    name, path = tokens.tokenizer, Path(tokens.tokenizer).expanduser()
    if name not in TOKENIZERS and path.suffix not in TOKENIZER_FILES:
        near = difflib.get_close_matches(name, TOKENIZERS, n=1, cutoff=0.4)
        hint = f"--set tokens.tokenizer={near[0] if near else 'gpt2'}"
        raise ConfigError(f"Unknown tokenizer {name!r}: gpt2, bpe, or a .json or .tiktoken file", "", hint)
    if name not in TOKENIZERS and not path.is_file():
        raise ConfigError(f"tokens.tokenizer: no such file: {path} (looked from {Path.cwd()})", "", "check the path")
    if name not in TOKENIZERS and not os.access(path, os.R_OK):
        raise ConfigError(f"tokens.tokenizer: {path} cannot be read", "", "give yourself permission to read it")
    if name != "bpe" and tokens.vocab_size:
        raise ConfigError(
            f'tokens.vocab_size is {tokens.vocab_size}, and tokens.tokenizer is "{name}"',
            "vocab_size applies only to a vocabulary that is trained",
            "leave vocab_size out, or --set tokens.tokenizer=bpe",
        )
    if name == "bpe" and tokens.vocab_size < MIN_VOCAB:
        raise ConfigError(
            f'tokens.vocab_size is {tokens.vocab_size}, a "bpe" tokenizer has at least {MIN_VOCAB}',
            "256 bytes, one merge and end-of-text",
            "--set tokens.vocab_size=4096",
        )
