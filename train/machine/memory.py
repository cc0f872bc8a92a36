"""A CUDA device's memory: how much of it this process may take, and which errors say that it ran out."""

import torch

HEADROOM = 0.08  # of the free memory is left alone: what else is on the GPU moves, and memory fragments


def cuda_memory(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of a CUDA device. What torch has cached for this process counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), total


def cap_memory(device: torch.device) -> None:
    """Let this process use what is free on a CUDA device, less the headroom: beyond it memory runs out at once.

    Call it before anything else is in the device's memory. Without a limit WSL2 moves what does not fit into the host's
    memory, and training is far slower, without any message.
    """
    free, total = cuda_memory(device)
    index = torch.cuda.current_device() if device.index is None else device.index  # torch refuses a bare "cuda" here
    torch.cuda.set_per_process_memory_fraction((1 - HEADROOM) * free / total, index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch.OutOfMemoryError, and the RuntimeErrors of what allocates in another way.

    Loading a kernel on a full GPU raises torch.AcceleratorError, Apple's GPU and NCCL raise types of their own.
    """
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    )
