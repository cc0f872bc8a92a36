"""What the machine has: the device, the precision it is good at, and how many sequences fit in its memory."""

import contextlib
import math
from contextlib import AbstractContextManager

import torch

from shards.errors import HostError
from train.config import ModelConfig, TrainConfig


def pick_device() -> torch.device:
    """CUDA if there is one (CUDA_VISIBLE_DEVICES chooses), else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def resolve_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bf16 where the GPU computes in it (Ampere and later), else fp32. HostError when bf16 is asked of another GPU."""
    able = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if config.precision == "bf16" and not able:
        raise HostError(f"{device_name(device)} does not compute in bf16", "", "--set train.precision=fp32")
    auto = device.type == "cuda" and able
    return torch.bfloat16 if config.precision == "bf16" or (config.precision == "auto" and auto) else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `precision` while the weights stay fp32."""
    if precision is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


def fitting_micro_batch(
    sequences: int, parameters: int, model: ModelConfig, vocab_size: int, device: torch.device, precision: torch.dtype
) -> int:
    """The most sequences at once that divide `sequences` and should fit: 8 % of the memory is left alone.

    Bytes a token, in bf16: 28 for each layer and unit of width, 10 for each vocabulary entry (fit to published runs of
    a 163 M model on 12 and 24 GB cards); fp32 twice that. Weights, gradients and optimizer: 16 bytes a parameter.
    """
    memory = 4 << 30
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    width = 2 if precision is torch.float32 else 1
    a_token = width * (28 * model.n_layer * model.d_model + 10 * vocab_size)
    room = int((memory * 0.92 - 16 * parameters) / (a_token * model.seq_len))
    small = [size for size in range(1, math.isqrt(sequences) + 1) if sequences % size == 0]
    return max(size for size in (*small, *(sequences // size for size in small)) if size <= max(1, room))
