"""What the machine has: the device, and the precision it is good at."""

import contextlib
import os
from contextlib import AbstractContextManager

import psutil
import torch

from shards.errors import HostError
from train.config import TrainConfig


def pick_device() -> torch.device:
    """CUDA if there is one (CUDA_VISIBLE_DEVICES chooses), else Apple's GPU, else the CPU.

    Of several processes that torchrun started on one machine each gets its own card: HostError when they are too many.
    """
    if torch.cuda.is_available():
        local, cards = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
        if local is not None and int(local) >= cards:
            raise HostError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', 'too many')} processes on this machine, which has {cards} CUDA "
                + ("card" if cards == 1 else "cards"),
                "each process trains on a card of its own",
                f"torchrun --nproc-per-node {cards} …",
            )
        return torch.device("cuda", torch.cuda.current_device() if local is None else int(local))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def devices_here(device: torch.device) -> list[torch.device]:
    """The devices of all processes on this machine that train the run; `device` is this one's."""
    if "LOCAL_RANK" not in os.environ:
        return [device]
    return [torch.device(device.type, local) for local in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))]


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_used(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took since the call before, on Apple's GPU now; else the process's RSS."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def resolve_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bf16 where the GPU computes in it (Ampere and later), fp16 on NVIDIA's before, else fp32.

    HostError when a type is asked for that the device does not compute in.
    """
    cuda = device.type == "cuda"
    bf16 = device.type == "cpu" or (cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    if (config.precision == "bf16" and not bf16) or (config.precision == "fp16" and not cuda):
        raise HostError(
            f"{device_name(device)} does not compute in {config.precision}", "", "--set train.precision=fp32"
        )
    if config.precision == "auto":
        return torch.float32 if not cuda else torch.bfloat16 if bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `precision` while the weights stay fp32."""
    if precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


def loss_scaler(device: torch.device, precision: torch.dtype) -> torch.amp.GradScaler | None:
    """What keeps fp16's small gradients from vanishing; the other types reach as far as fp32."""
    return torch.amp.GradScaler(device.type) if precision is torch.float16 else None
