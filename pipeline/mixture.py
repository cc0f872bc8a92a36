"""The token folders that a recipe names instead of a corpus, and whether they may be mixed."""

import math
from collections.abc import Callable
from pathlib import Path

from pipeline.home import folders
from pipeline.home.layout import Layout
from prepare.config import TokensConfig
from shards.errors import ConfigError
from shards.manifest import Manifest
from train.data.order import Interleave


def named_folders(layout: Layout, tokens: TokensConfig) -> dict[Path, float]:
    """What `tokens.folder` or `tokens.mix` names, each with its weight; nothing when the recipe names none.

    ConfigError when one is not there, or when they do not fit together.
    """
    if tokens.folder and tokens.mix:
        raise ConfigError(
            f"tokens.folder is {tokens.folder}, and tokens.mix is set too",
            "a run learns from the one folder or from the mixture",
            "leave one of them out",
        )
    if not tokens.mix:
        return {_under_home(layout, tokens.folder, "tokens.folder"): 1.0} if tokens.folder else {}
    for name, weight in tokens.mix.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"tokens.mix: the weight of {name} is {weight:g}",
                "each folder gives windows in proportion to its weight, a number above 0",
                f"leave {name} out, or give it one",
            )
    Interleave(list(tokens.mix.values()))  # refuses weights that are too fine to be exact
    found = {_under_home(layout, name, "tokens.mix"): weight for name, weight in tokens.mix.items()}
    if len(found) < len(tokens.mix):
        raise ConfigError("tokens.mix names a folder twice", "its weight is not known then", "name each once")
    if len(found) > 1:
        _require_alike({path.name: Manifest.read(path) for path in found})
    return found


def share(weights: dict[Path, float], folder: Path) -> str:
    """What part of a run's windows comes from the folder, as text before its size; "" where it is the only one."""
    return f"{100 * weights[folder] / sum(weights.values()):.3g} % of the mix, " if len(weights) > 1 else ""


def misfit(weights: dict[Path, float]) -> str:
    """What is odd about the weights, "" if nothing is: those of fractions that are not 1 in all."""
    total = sum(weights.values())
    if len(weights) < 2 or max(weights.values()) >= 1 or math.isclose(total, 1):
        return ""
    return f"tokens.mix: the weights add up to {total:.6g}, not to 1; each is taken as its part of that"


def _under_home(layout: Layout, name: str, field: str) -> Path:
    folder = folders.find(layout, name)
    ours = layout.tokens / folder.name  # may be a link to it
    if not (ours.exists() and ours.samefile(folder)):
        raise ConfigError(
            f"{field}: {folder} is not under {layout.tokens}",
            "runs find their tokens there",
            f"millpond shards pull {folder}",
        )
    return ours


def _require_alike(manifests: dict[str, Manifest]) -> None:
    if len({manifest.tokenizer.ranks_sha256 for manifest in manifests.values()}) > 1:
        raise ConfigError(
            "tokens.mix: the folders have different tokenizers:\n"
            + _each(manifests, lambda manifest: str(manifest.tokenizer)),
            "one id would mean different texts",
            "prepare them again with the same tokens.tokenizer",
        )
    splits = {_split(manifest) for manifest in manifests.values()}
    if len(splits) > 1 or _BY_FILES in splits:
        raise ConfigError(
            "tokens.mix: the folders are not split by the same rule:\n" + _each(manifests, _split),
            "a text could be validation in one and training in another, and the validation loss would say too little",
            "prepare them again with the same tokens.val_fraction, and without corpus.val_files",
        )


_BY_FILES = "its own files are validation"


def _split(manifest: Manifest) -> str:
    if any(source.split for source in manifest.sources):
        return _BY_FILES
    return f"documents are validation by their hash, val_fraction {manifest.val_fraction:g}"


def _each(manifests: dict[str, Manifest], say: Callable[[Manifest], str]) -> str:
    return "\n".join(f"  {name}: {say(manifest)}" for name, manifest in manifests.items())
