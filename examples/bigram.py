"""The loss of a bigram model on a token folder: python examples/bigram.py data/tokens/FOLDER

A baseline for a run on a small vocabulary: a language model should be better than counting pairs.
"""

import sys
from pathlib import Path

import numpy as np

from shards import TokenFolder

WINDOW = 1 << 20  # tokens read at once
SMOOTHING = 0.1  # added to each count


def main(path: Path) -> None:
    """Count pairs in training, and print the validation loss in nats per token."""
    folder = TokenFolder(path)
    size = folder.tokenizer.vocab_size
    if size > 8192:
        sys.exit(f"{size:,} ids make {size**2:,} pairs: too many for this example")
    counts = np.full(size * size, SMOOTHING)
    train, val = folder.stream("train"), folder.stream("val")
    for start in range(0, len(train) - 1, WINDOW):
        ids = train.window(start, min(WINDOW + 1, len(train) - start)).astype(np.int64)
        counts += np.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
    logs = np.log(counts.reshape(size, size))
    logs -= np.log(counts.reshape(size, size).sum(1, keepdims=True))
    ids = val.window(0, min(WINDOW, len(val))).astype(np.int64)
    print(f"validation {-logs[ids[:-1], ids[1:]].mean():.4f} nats/token; guessing is {np.log(size):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
