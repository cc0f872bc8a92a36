"""What a run learns from and is measured on: one token folder, or several in a mixture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from shards.errors import RefusedError
from shards.manifest import Split, TokenizerRecord
from shards.reader import TokenFolder
from shards.tokenizer import Tokenizer
from train.config import TrainConfig
from train.data.order import Interleave
from train.data.windows import FolderWindows, Mixture, Windows


class Source(NamedTuple):
    """A token folder, how many of its parts the run sees, whatever it grows to, and its weight among others."""

    folder: Path
    parts: int
    weight: float = 1.0


class OpenSources:
    """The sources' folders, open, in windows of `seq_len`. The tokenizer is the first one's, as it must be all others'.

    `verify` as TokenFolder has it. RefusedError when a split of one of them has not even one window.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, verify: Literal["size", "hash"] = "size") -> None:
        self.folders = [TokenFolder(source.folder, verify=verify, parts=source.parts) for source in sources]
        self.parts = sum(folder.parts for folder in self.folders)
        self._seq_len, self._weights = seq_len, [source.weight for source in sources]
        for folder in self.folders:
            _require_window(folder, "train", seq_len, "lower")
            _require_window(folder, "val", seq_len, "raise")

    @property
    def tokenizer(self) -> Tokenizer:
        """What all of them were tokenized with."""
        return self.folders[0].tokenizer

    @property
    def tokenizer_record(self) -> TokenizerRecord:
        """What their manifests say of it."""
        return self.folders[0].manifest.tokenizer

    def training(self, train: TrainConfig) -> Windows:
        """The windows to learn from, in the order of the recipe."""
        windows = [FolderWindows.of(folder, "train", self._seq_len, train.seed, train.order) for folder in self.folders]
        return Mixture(windows, self._weights) if len(windows) > 1 else windows[0]

    def evaluated_tokens(self, eval_tokens: int) -> int:
        """How many targets `measure` reads when it is asked for `eval_tokens`: whole windows, at most all there are."""
        return sum(tokens for _, _, tokens in self.validation(eval_tokens))

    def validation(self, eval_tokens: int) -> Iterator[tuple[TokenFolder, FolderWindows, int]]:
        """Each folder's validation, and how many targets of it are its share of `eval_tokens`."""
        interleave = Interleave(self._weights)
        for folder, share in zip(self.folders, interleave.shares, strict=True):
            windows = FolderWindows.of(folder, "val", self._seq_len, 0, "sequential")
            asked = max(1, eval_tokens * share // interleave.period // self._seq_len)
            yield folder, windows, self._seq_len * (min(windows.count, asked) if eval_tokens else windows.count)


def _require_window(folder: TokenFolder, split: Split, seq_len: int, way: str) -> None:
    tokens = sum(len(shard.tokens) for shard in folder.shards(split))
    if tokens <= seq_len:
        chosen = "name files with corpus.val_files, " if split == "val" else ""
        raise RefusedError(
            f"{folder.path}: split {split} has {tokens:,} tokens, one window takes {seq_len + 1:,}",
            "a run is trained on the one split and trusted by the other",
            f"{chosen}prepare more text, {way} tokens.val_fraction, or choose a smaller model.seq_len",
        )
