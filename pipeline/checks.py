"""What can be known of a recipe from its fields, and the first look at the disk, before anything is fetched or read."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Recipe
from pipeline.home.layout import Layout
from prepare.config import TokensConfig
from prepare.text.filters import parse_filters
from shards.errors import ConfigError
from shards.manifest import MANIFEST

_TOKENIZERS = ("gpt2", "bpe")
_FILES = (".tiktoken", ".json")


def require_preparable(layout: Layout, recipe: Recipe) -> None:
    """ConfigError, with all of them, for what makes the recipe's tokens impossible."""
    _raise(_of_tokens(layout, recipe))


def require_trainable(layout: Layout, recipe: Recipe) -> None:
    """ConfigError as well for what makes training on them impossible."""
    _raise([*_of_tokens(layout, recipe), *_of_training(recipe)])


def _raise(found: Iterator[ConfigError] | list[ConfigError]) -> None:
    errors = list(found)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError("\n".join(error.what for error in errors), "", "; ".join(error.fix for error in errors))


def _of_tokens(layout: Layout, recipe: Recipe) -> Iterator[ConfigError]:
    tokens = recipe.tokens
    if tokens.folder or tokens.mix:  # presets have settings that are theirs to ignore then
        return
    yield from _tokenizer(tokens)
    try:
        parse_filters(recipe.corpus.filters)
    except ConfigError as error:
        yield error
    for name in tokens.forbid:
        if not any((place / MANIFEST).exists() for place in (layout.tokens / name, Path(name).expanduser())):
            yield ConfigError(
                f"tokens.forbid: there is no token folder {name}, here or under {layout.tokens.absolute()}",
                "its validation could not be kept out",
                "check the name: millpond shards ls",
            )


def _tokenizer(tokens: TokensConfig) -> Iterator[ConfigError]:
    name, path = tokens.tokenizer, Path(tokens.tokenizer).expanduser()
    if name not in _TOKENIZERS and path.suffix not in _FILES:
        near = difflib.get_close_matches(name, _TOKENIZERS, n=1, cutoff=0.4)
        hint = f"--set tokens.tokenizer={near[0] if near else 'gpt2'}"
        yield ConfigError(f"Unknown tokenizer {name!r}: gpt2, bpe, or a .json or .tiktoken file", "", hint)
    elif name not in _TOKENIZERS and not path.is_file():
        yield ConfigError(f"tokens.tokenizer: no such file: {path} (looked from {Path.cwd()})", "", "check the path")
    elif name not in _TOKENIZERS and not os.access(path, os.R_OK):
        yield ConfigError(f"tokens.tokenizer: {path} cannot be read", "", "give yourself the right to read it")
    elif name != "bpe" and tokens.vocab_size:
        yield ConfigError(
            f'tokens.vocab_size is {tokens.vocab_size}, and tokens.tokenizer is "{name}"',
            "vocab_size applies only to a vocabulary that is trained",
            "leave vocab_size out, or --set tokens.tokenizer=bpe",
        )
    elif name == "bpe" and tokens.vocab_size < 258:
        yield ConfigError(
            f'tokens.vocab_size is {tokens.vocab_size}, a "bpe" tokenizer has at least 258',
            "256 bytes, one merge and end-of-text",
            "--set tokens.vocab_size=4096",
        )


def _of_training(recipe: Recipe) -> Iterator[ConfigError]:
    from prepare.corpus.pin import NAMED

    tokens, corpus = recipe.tokens, recipe.corpus
    has_own = corpus.val_files or (corpus.name in NAMED and NAMED[corpus.name].val_files)
    if not (tokens.folder or tokens.mix or has_own or tokens.val_fraction):
        yield ConfigError(
            "training needs validation text and none was selected: tokens.val_fraction is 0, without corpus.val_files",
            "a run is evaluated before its first step and after its last",
            "--set tokens.val_fraction=0.005, or name files with corpus.val_files",
        )
