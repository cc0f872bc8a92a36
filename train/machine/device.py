"""What the machine has: the device, and the precision it is good at."""

import contextlib
import os
from contextlib import AbstractContextManager
from typing import assert_never

import psutil
import torch

from shards.errors import HostError
from train.config import DeviceName, TrainConfig
from train.machine.gpus import ON_THE_CPU, ask_torch, read_driver, why_none, why_not


def pick_device(wanted: DeviceName = "auto") -> torch.device:
    """The device of train.device. `auto`: CUDA's current GPU if there is one, else Apple's GPU, else the CPU.

    Of several processes that torchrun started on one machine each gets its own GPU. HostError when they are too many,
    and when torch cannot use the GPU that the machine has, or with `cuda` has none: never the CPU instead.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    build = ask_torch()
    if build.gpus:
        device = _own_gpu(len(build.gpus))
        if refusal := why_not(build.gpus[device.index], build, read_driver()):
            raise refusal
        return device
    if refusal := why_none(read_driver(), build, os.environ.get("CUDA_VISIBLE_DEVICES")):
        raise refusal
    if wanted == "cuda":
        raise HostError(
            "train.device is cuda, and this machine has no NVIDIA GPU or no driver for it",
            f"torch {build.version} says: {build.error}",
            ("" if build.cuda else "install a build of torch for CUDA, and ")
            + f"install NVIDIA's driver; in a container, give it the GPU (docker run --gpus all); or {ON_THE_CPU}",
        )
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def devices_here(device: torch.device) -> list[torch.device]:
    """The devices of all processes on this machine that train the run; `device` is this one's."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's: process k has GPU k
    if device.type != "cuda" or processes is None:
        return [device]
    return [torch.device("cuda", local) for local in range(int(processes))]


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
    match config.precision:
        case "auto":
            return torch.float32 if not cuda else torch.bfloat16 if bf16 else torch.float16
        case "fp32":
            return torch.float32
        case "bf16":
            wanted, can = torch.bfloat16, bf16
        case "fp16":
            wanted, can = torch.float16, cuda
        case _:
            assert_never(config.precision)
    if not can:
        raise HostError(
            f"{device_name(device)} does not compute in {config.precision}", "", "--set train.precision=fp32"
        )
    return wanted


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `precision` while the weights stay fp32."""
    if precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


def loss_scaler(device: torch.device, precision: torch.dtype) -> torch.amp.GradScaler | None:
    """What keeps fp16's small gradients from vanishing; the other types reach as far as fp32."""
    return torch.amp.GradScaler(device.type) if precision is torch.float16 else None


def _own_gpu(gpus: int) -> torch.device:
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return torch.device("cuda", torch.cuda.current_device())
    if int(local) >= gpus:
        raise HostError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'too many')} processes on this machine, which has {gpus} CUDA "
            + ("GPU" if gpus == 1 else "GPUs"),
            "each process trains on a GPU of its own",
            f"torchrun --nproc-per-node {gpus} …",
        )
    return torch.device("cuda", int(local))
