"""What can be known of a recipe from its fields, and the first look at the disk, before anything is fetched or read."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Recipe
from pipeline.home.layout import Layout
from prepare.config import require_tokenizer
from prepare.text.filters import parse_filters
from shards.errors import ConfigError
from shards.manifest import MANIFEST


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
    for check in (lambda: require_tokenizer(tokens), lambda: parse_filters(recipe.corpus.filters)):
        try:
            check()
        except ConfigError as error:
            yield error
    for name in tokens.forbid:
        if not any((place / MANIFEST).exists() for place in (layout.tokens / name, Path(name).expanduser())):
            yield ConfigError(
                f"tokens.forbid: there is no token folder {name}, here or under {layout.tokens.absolute()}",
                "its validation could not be kept out",
                "check the name: millpond shards ls",
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
