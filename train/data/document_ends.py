"""Where documents end inside the windows of a batch.

It is one tensor, `documents`: (pieces + 1,) int32, from 0 to B * T, every window end and every place in the flattened
(B, T) inputs where a document begins, in order; flash-attention calls it cu_seqlens.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def ends_of(
    boundaries: NDArray[np.int64], sequences: int, seq_len: int, documents_per_window: float = 1.0
) -> NDArray[np.int32]:
    """The `documents` of a batch of `sequences` windows, in which documents begin at `boundaries`, in any order.

    The last end is repeated until the pieces are a power of two, at least twice as many as batches have on average and
    eight more: each shape is compiled separately, which takes a minute, and a piece without tokens costs nothing.
    """
    ends = np.unique(np.concatenate([np.arange(sequences + 1) * seq_len, boundaries])).astype(np.int32)
    least = int(2 * sequences * (1 + documents_per_window)) + 8
    pieces = 1 << (max(len(ends) - 1, least) - 1).bit_length()
    return np.pad(ends, (0, pieces + 1 - len(ends)), mode="edge")


def of_rows(documents: Tensor, first: int, count: int, seq_len: int) -> Tensor:
    """The `documents` of rows `first` to `first + count` of the batch, of the same shape: nothing waits for a size."""
    return (documents - first * seq_len).clamp(0, count * seq_len)
