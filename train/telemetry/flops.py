"""What a token costs in arithmetic, and what a GPU could do at most: the two numbers behind MFU."""

import re
import time
from functools import cache
from typing import Literal, NamedTuple

import torch

from train.config import ModelConfig
from train.machine.device import device_name, synchronize

MEASURED_SECONDS = 0.1

# Dense FLOP/s in bf16 and fp16, accumulated in fp32, as the maker publishes them: the halves of "sparse" figures.
# Ampere GA102, Ada and RTX Blackwell architecture papers (GeForce: twice the fp32 rate); data sheets of the others.
GPUS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "A100 SXM4": 312e12,
    "A100 SXM": 312e12,
    "A100 PCIE": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 ADA GENERATION": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX A5000": 111.1e12,
    "RTX A4000": 76.7e12,
    "RTX 5090": 209.5e12,
    "RTX 5080": 112.6e12,
    "RTX 5070 TI": 87.9e12,
    "RTX 5070": 61.7e12,
    "RTX 4090": 165.2e12,
    "RTX 4080 SUPER": 104.4e12,
    "RTX 4080": 97.5e12,
    "RTX 4070 TI SUPER": 88.2e12,
    "RTX 4070 TI": 80.2e12,
    "RTX 4070 SUPER": 71e12,
    "RTX 4070": 58.3e12,
    "RTX 4060 TI": 44.1e12,
    "RTX 4060": 30.2e12,
    "RTX 3090 TI": 80e12,
    "RTX 3090": 71e12,
    "RTX 3080 TI": 68.2e12,
    "RTX 3080": 59.5e12,  # the one of 12 GB, which has the same name, does 3 % more
    "RTX 3070 TI": 43.5e12,
    "RTX 3070": 40.6e12,
    "RTX 3060 TI": 32.4e12,
    "RTX 3060": 25.5e12,
}
FP16_GPUS = {  # from before bf16
    "V100 SXM2": 125e12,
    "V100 PCIE": 112e12,
    "T4": 65e12,
    "TITAN RTX": 130.5e12,
    "RTX 2080 TI": 53.8e12,
    "RTX 2080": 40.3e12,
    "RTX 2070": 29.9e12,
}


class Peak(NamedTuple):
    """The most a device does, in FLOP/s, and how that is known."""

    flops: float
    source: Literal["table", "measured"]


def flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """FLOPs of one token forward and backward: 6 for each weight of a matrix, and 12 L D T for attention's products.

    As PaLM's appendix B counts (Chowdhery et al. 2022): causal attention as if it were full, activations that are
    computed again not at all. Looking up an embedding is free, so tied and untied models cost the same.
    """
    weights = model.n_layer * model.block_weights + vocab_size * model.d_model
    return 6 * weights + 12 * model.n_layer * model.d_model * model.seq_len


def peak(device: torch.device, precision: torch.dtype) -> Peak:
    """The device's peak in `precision`: the table's where it has the GPU and the type, else measured now."""
    known = {torch.bfloat16: GPUS, torch.float16: GPUS | FP16_GPUS}.get(precision, {})
    found = known.get(gpu_of(device_name(device))) if device.type == "cuda" else None
    return Peak(found, "table") if found else Peak(measured_peak(device, precision), "measured")


def gpu_of(name: str) -> str:
    """The GPU as the tables spell it: the driver's name without brand and memory, all else kept.

    "NVIDIA A100-SXM4-80GB" is an A100 SXM4; a "Ti", a "Laptop GPU" or a slice of a GPU is another GPU.
    """
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(
        word
        for word in words
        if word not in {"NVIDIA", "GEFORCE", "TESLA"} and not re.fullmatch(r"\d+GB|HBM\d\w?", word)
    )


@cache
def measured_peak(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of the best of some square matrix products, in a tenth of a second; once a process.

    On a CPU one thread's, times the threads: several are as slow as the one that others keep waiting.
    """
    size = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # the run's own generator is not touched
    a, b = (torch.randn(size, size, device=device, generator=generator).to(precision) for _ in range(2))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads > 1:
        torch.set_num_threads(1)
    out = torch.mm(a, b)
    synchronize(device)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < MEASURED_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    del a, b, out
    if threads > 1:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return threads * 2 * size**3 / best
