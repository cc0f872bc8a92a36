"""Our step against a plain eager one of the same model, in one run: fp32 on the CPU, autocast on CUDA.

    python -P tests/benchmarks/train.py [--size small|gpt2] [--micro-batch 4] [--accumulation 2] [--rounds 7]

The plain one is the usual script in our own words (tests/support/plain.py): GPT-2 of nn.Linear and nn.LayerNorm with
one matrix for q, k and v, scaled_dot_product_attention, F.cross_entropy on the logits of the whole micro-batch, AdamW
as torch makes it by default. `by hand` has attention with a stored mask, norms and GELU spelled out, fp16 with a scaler
on CUDA, and reads each micro-batch's loss: the way of the run that millpond sets out to beat. They take turns, and the
median ratio of neighbours counts, so that what else the machine does falls on all; on the CPU it is one thread's CPU
time that is compared (--threads). Peak memory, of two steps in a process of its own: above the weights on the CPU, in
all on CUDA.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from plain import Plain, plain_step

from train.compile import compile_model, wants_compile
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.device import autocast, device_name, loss_scaler, pick_device, resolve_precision
from train.loader import Batch
from train.model import Model
from train.optim import Optimizers
from train.step import Stepper

SIZES = {
    "small": (ModelConfig(family="gpt2", n_layer=4, n_head=4, d_model=256, seq_len=256), 8192),
    "gpt2": (ModelConfig(family="gpt2", n_layer=12, n_head=12, d_model=768, seq_len=1024), 50257),
}


class Random:
    """The same batch again and again."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        config, vocab_size = SIZES[arguments.size]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (arguments.micro_batch, config.seq_len + 1), generator=generator).to(device)
        self.batch = Batch(ids[:, :-1], ids[:, 1:])

    def next(self) -> Batch:
        return self.batch


def other_step(by_hand: bool, arguments: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    config, vocab_size = SIZES[arguments.size]
    precision = torch.float16 if by_hand and device.type == "cuda" else resolve_precision(TrainConfig(), device)
    batches = Random(arguments, device)

    def next_batch() -> tuple[Tensor, Tensor]:
        batch = batches.next()
        return batch.inputs, batch.targets

    model = Plain(config, vocab_size, by_hand).to(device)
    return plain_step(model, next_batch, arguments.accumulation, lambda: autocast(device, precision))


def our_step(arguments: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    config, vocab_size = SIZES[arguments.size]
    train = TrainConfig(compile=arguments.compile)
    precision = resolve_precision(train, device)
    model, batches = Model(config, vocab_size).to(device), Random(arguments, device)
    if wants_compile(train, device):
        compile_model(model)
    optim = OptimConfig(name="adamw", lr=6e-4, beta1=0.9, weight_decay=0.1, eps=1e-8)
    optimizers = Optimizers(model, optim)
    scaler = loss_scaler(device, precision)
    stepper = Stepper(model, optimizers, 1.0, lambda: autocast(device, precision), scaler)
    return lambda: stepper.step(batches, arguments.accumulation).loss


STEPS = {"plain": partial(other_step, False), "by hand": partial(other_step, True), "ours": our_step}


def seconds(step: Callable[[], Tensor], steps: int, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    for _ in range(steps):
        loss = step()
    loss.item()  # waits for the device
    return clock() - began


def peak_mib(name: str, arguments: argparse.Namespace) -> float:
    """In a process of its own, since a process's peak only grows."""
    device = pick_device()
    step = STEPS[name](arguments, device)
    if device.type == "cuda":
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = pick_device()
    config, vocab_size = SIZES[arguments.size]
    tokens = arguments.steps * arguments.accumulation * arguments.micro_batch * config.seq_len
    precision = str(resolve_precision(TrainConfig(), device)).removeprefix("torch.")
    print(f"{device_name(device)}, {precision}, torch {torch.__version__}")
    print(f"GPT-2 {arguments.size}: {config.n_layer} layers of {config.d_model}, vocabulary {vocab_size:,}")
    print(f"{arguments.accumulation} x {arguments.micro_batch} x {config.seq_len} tokens a step")
    peaks = {}
    for name in STEPS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_mib, name, arguments).result()
    steps = {name: make(arguments, device) for name, make in STEPS.items()}
    first = {name: step().item() for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, arguments.steps, device))
    for name in steps:
        rate = tokens / statistics.median(taken[name])
        print(f"{name:<7} {rate:10,.0f} tok/s   peak {peaks[name]:8,.0f} MiB   first loss {first[name]:.3f}")
    for name in ("plain", "by hand"):
        ratio = statistics.median(theirs / ours for theirs, ours in zip(taken[name], taken["ours"], strict=True))
        print(f"ours is {ratio:.2f}x as fast as {name}, with {peaks['ours'] / peaks[name]:.2f}x of its peak memory")


if __name__ == "__main__":
    main()
