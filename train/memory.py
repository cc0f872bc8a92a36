"""Which errors say that a device's memory ran out."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch.OutOfMemoryError, and the RuntimeErrors of what allocates in another way.

    Loading a kernel on a full GPU raises torch.AcceleratorError, Apple's GPU and NCCL raise types of their own.
    """
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    )
