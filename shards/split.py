"""Which documents are validation: a pure function of the text, so the same text is validation in every corpus."""

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Split


def is_val(hashes: NDArray[np.uint64], val_fraction: float, given: Split | None) -> NDArray[np.bool_]:
    """For each document whether its hash (xxh3-64 of its UTF-8) falls under the threshold `val_fraction * 2^64`.

    Raising the fraction only ever moves documents from train to validation. `given`: the split that the source file
    itself is in, whatever the hashes.
    """
    if given is not None:
        return np.full(len(hashes), given == "val")
    return hashes < np.uint64(int(val_fraction * 2**64))
