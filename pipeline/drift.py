"""Whether a recipe is the one that a run was made with, found before anything is tokenized, by field and by file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import config, mixture
from pipeline.config import Recipe
from pipeline.home import pins, runs
from pipeline.home.layout import Layout, RunPaths
from prepare.config import TokensConfig
from shards.errors import ConfigError
from shards.fingerprint import Difference, differences, identity, neutral
from shards.manifest import MANIFEST, Manifest, SourceRecord
from train.config import neutral_tables

if TYPE_CHECKING:
    from prepare.corpus.corpus import Corpus

MOST_FILES = 10  # that are named, each on a line of its own


def refuse_before_work(layout: Layout, run: RunPaths, recipe: Recipe) -> None:
    """RefusedError when the recipe alone shows that it is another one than that of the run, if there is such a run.

    What only the text can show, its files and its vocabulary, is left to `refuse_other_tokens`.
    """
    if not run.recipe.exists():
        return
    if given := mixture.named_folders(layout, recipe.tokens):
        runs.refuse_drift(run, runs.identity_of(recipe, pins.pin(given)))
        return
    pinned, made = pins.pinned(run), config.load_run(run.recipe)
    before, now = _tables(made), _tables(recipe)
    if pinned.others:
        before["tokens.mix"] = {one.folder: one.weight for one in pinned.folders}
    elif made.tokens.folder or made.tokens.mix:
        now["corpus"] = {"name": _corpus(recipe)["name"]}
        before["corpus"] = {"name": pinned.folder.rpartition("-")[0]}
    else:
        before |= {"corpus": _corpus(made), "tokens": _tokens(made.tokens)}
        now |= {"corpus": _corpus(recipe), "tokens": _tokens(recipe.tokens)}
    if found := differences(before, now, neutral_tables() | {"tokens": neutral(TokensConfig)}):
        raise runs.drifted(run, found)


def refuse_to_resume(run: RunPaths, recipe: Recipe, pinned: pins.Pinned) -> None:
    """RefusedError when settings make `recipe` another one than the run's; ConfigError when they would be ignored."""
    made = config.load_run(run.recipe)
    if ignored := differences(_texts(made), _texts(recipe)):
        raise ConfigError(
            "these settings would have no effect:\n" + "\n".join(map(str, ignored)),
            f"run {run.root.name} is resumed on the tokens that it was started on",
            "leave them out, or start another run: millpond train CONFIG --name OTHER",
        )
    runs.refuse_drift(run, runs.identity_of(recipe, pinned))


def refuse_other_tokens(layout: Layout, run: RunPaths, folder: str, corpus: "Corpus") -> None:
    """RefusedError, with the files that changed, when the run was started on another token folder than `folder`."""
    if not run.recipe.exists():
        return
    pinned = pins.pinned(run)
    if pinned.folder == folder and not pinned.others:
        return
    lines: list[Difference | str] = [Difference("token_folder", pinned.folder, folder)]
    own = layout.tokens / pinned.folder
    if not (own / MANIFEST).exists():
        raise runs.drifted(run, lines)
    manifest = Manifest.read(own)
    lines += differences(manifest.corpus.details, corpus.record.details, prefix="corpus: ")
    files = list(_changed_files(manifest.sources, corpus.sources))
    lines += files[:MOST_FILES]
    if len(files) > MOST_FILES:
        lines.append(f"  and {len(files) - MOST_FILES:,} more files")
    if len(lines) == 1:
        lines.append("  the files are the same: tokens.tokenizer, tokens.forbid or the tokenizers package changed")
    raise runs.drifted(run, lines, f"--set tokens.folder={pinned.folder} trains on the tokens it was started on")


@contextmanager
def with_ways_out(layout: Layout, run: RunPaths) -> Iterator[None]:
    """A ConfigError of the block, a text that is not where it was, names what resumes a run whose tokens are here."""
    try:
        yield
    except ConfigError as error:
        if not run.recipe.exists() or not (pinned := pins.pinned(run)).are_in(layout):
            raise
        fix = f"{error.fix}; or, as run {run.root.name} has its tokens: millpond resume {run.root.name}"
        if not pinned.others:
            fix += f", or --set tokens.folder={pinned.folder}"
        raise ConfigError(error.what, error.why, fix) from error


def _texts(recipe: Recipe) -> dict[str, Any]:
    return {"corpus": msgspec.to_builtins(recipe.corpus), "tokens": msgspec.to_builtins(recipe.tokens)}


def _tables(recipe: Recipe) -> dict[str, Any]:
    return {table: identity(getattr(recipe, table)) for table in ("model", "optim", "train")}


def _corpus(recipe: Recipe) -> dict[str, Any]:
    """Those fields of a corpus that are in the fingerprint of its tokens, or in their name, as they are."""
    from prepare.corpus import pin
    from prepare.text.filters import parse_filters

    corpus = pin.resolve(recipe.corpus)
    filters = [each.text for each in parse_filters(corpus.filters)]
    return {"kind": corpus.kind, "name": corpus.name, "text_column": corpus.text_column, "filters": filters}


def _tokens(tokens: TokensConfig) -> dict[str, Any]:
    """Those fields that are in the fingerprint as they are. Of a tokenizer's file the contents are, not the path."""
    return identity(tokens) | {"tokenizer": "bpe" if tokens.tokenizer == "bpe" else "gpt2, or a file"}


def _changed_files(before: list[SourceRecord], now: list[SourceRecord]) -> Iterator[str]:
    """A line for each file that is not what it was."""
    old, new = ({source.name: source for source in sources} for sources in (before, now))
    gone = {old[name].digest: name for name in old.keys() - new.keys()}
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            was = gone.pop(new[name].digest, None)
            yield f"  {name}: is new" if was is None else f"  {name}: was called {was}"
        elif name in new and old[name].digest != new[name].digest:
            yield f"  {name}: changed, {old[name].nbytes:,} bytes -> {new[name].nbytes:,} bytes"
        elif name in new and old[name].split != new[name].split:
            yield f"  {name}: {_split(old[name])} -> {_split(new[name])}"
    for name in sorted(gone.values()):
        yield f"  {name}: is not there any more"


def _split(source: SourceRecord) -> str:
    return {"val": "all validation", "train": "all training", None: "split by each document's hash"}[source.split]
