"""Print what is in a token folder: python examples/folder_statistics.py data/tokens/FOLDER"""

import sys
from pathlib import Path

import numpy as np

from shards import TokenFolder


def main(path: Path) -> None:
    """Count documents and tokens of both splits, and show the beginning of the first document."""
    folder = TokenFolder(path)
    print(f"{path.name}: {folder.tokenizer.name}, {folder.tokenizer.vocab_size:,} ids")
    for split in ("train", "val"):
        lengths = [np.diff(shard.documents["start"], append=len(shard.tokens)) for shard in folder.shards(split)]
        count, tokens = sum(map(len, lengths)), len(folder.stream(split))
        median = int(np.median(np.concatenate(lengths))) if count else 0
        print(f"{split:<6} {count:>10,} documents  {tokens:>14,} tokens  median {median:,} tokens")
    print(folder.tokenizer.decode(folder.shards("train")[0].document(0)[1:81]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
