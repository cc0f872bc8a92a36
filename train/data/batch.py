"""What a step learns from at once, and how it is cut where memory runs out."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from train.data.document_ends import of_rows


class Batch(NamedTuple):
    """`inputs` and `targets`, each (B, T) int64 on the device; targets are the inputs one token later.

    `documents` says where documents end, as document_ends.py has it: (pieces + 1,) int32 on the device.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None = None


def cut(batch: Batch, pieces: int) -> Iterator[Batch]:
    """The rows of `batch` in so many equal pieces."""
    sequences, seq_len = batch.inputs.shape
    size = sequences // pieces
    for first in range(0, sequences, size):
        rows = slice(first, first + size)
        documents = None if batch.documents is None else of_rows(batch.documents, first, size, seq_len)
        yield Batch(batch.inputs[rows], batch.targets[rows], documents)
