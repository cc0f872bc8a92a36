"""`millpond shards import`: a recipe whose corpus is tokens, made of the options of that command."""

from pathlib import Path

from pipeline.config import Recipe
from pipeline.home.layout import Layout
from pipeline.stages import Pipeline
from pipeline.terminal import Terminal
from prepare.config import CorpusConfig, TokensConfig
from prepare.corpus.pin import local_files_of
from shards.errors import ConfigError, MillpondError
from shards.manifest import Manifest

VAL_FRACTION = 0.005
_OPTIONS = {  # what a recipe calls the same
    "corpus.val_files": "--val",
    "corpus.files": "FILES",
    "corpus.name": "--name",
    "tokens.val_fraction": "--val-fraction",
    "tokens.tokenizer": "--tokenizer",
}


def import_tokens(
    files: tuple[str, ...],
    val_files: tuple[str, ...],
    name: str,
    val_fraction: float | None,
    tokenizer: str,
    home: Path,
    terminal: Terminal,
) -> Path:
    """Make the token folder and return it. Without `val_files` a fraction of the documents is split off, and said.

    ConfigError in the words of the command for what its options get wrong; nothing is left behind then.
    """
    if val_files and val_fraction is not None:
        raise ConfigError("--val and --val-fraction are both given", "validation would be given twice", "leave one out")
    fraction = 0.0 if val_files else VAL_FRACTION if val_fraction is None else val_fraction
    corpus = CorpusConfig(kind="files", name=name, files=files, val_files=val_files)
    recipe = Recipe(corpus=corpus, tokens=TokensConfig(tokenizer=tokenizer, val_fraction=fraction))
    try:
        _refuse_both_sides(corpus)
        (folder,) = Pipeline(Layout(home), name, recipe, terminal).prepare()
    except MillpondError as error:
        error.what, error.why, error.fix = map(_in_options, (error.what, error.why, error.fix))
        raise
    manifest = Manifest.read(folder)
    counts = f"{manifest.tokens('train'):,} for training and {manifest.tokens('val'):,} for validation"
    how = "as given" if val_files else f"{100 * fraction:g} % of the documents, by their hash, are validation"
    terminal.note(f"tokens: {counts} ({how}{'' if val_files else '; --val FILE or --val-fraction F changes that'})")
    return folder


def _refuse_both_sides(corpus: CorpusConfig) -> None:
    """ConfigError when a file, however it is spelled, is given for training and for validation."""
    train, val = local_files_of(corpus)
    for inode, path in val.files.items():
        if inode in train.files:
            raise ConfigError(
                f"{path}: is given for training, and with --val for validation",
                "the validation loss would be of tokens that were trained on",
                "name other tokens with --val, or split some off with --val-fraction",
            )


def _in_options(text: str) -> str:
    for field, option in _OPTIONS.items():
        text = text.replace(f"--set {field}=", f"{option} ").replace(field, option)
    return text
