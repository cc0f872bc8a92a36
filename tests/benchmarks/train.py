"""Our step against a plain eager one of the same model, in one run: fp32 on the CPU, autocast on CUDA.

    python -P tests/benchmarks/train.py [--size small|gpt2] [--micro-batch 4] [--accumulation 2] [--rounds 7]

The plain one is the usual script in our own words (tests/support/plain.py): GPT-2 of nn.Linear and nn.LayerNorm with
one matrix for q, k and v, scaled_dot_product_attention, F.cross_entropy on the logits of the whole micro-batch, AdamW
as torch makes it by default. `by hand` has attention with a stored mask, norms and GELU spelled out, fp16 with a scaler
on CUDA, and reads each micro-batch's loss: the way of the run that millpond sets out to beat. They take turns, and the
median ratio of neighbours counts, so that what else the machine does falls on all; on the CPU it is one thread's CPU
time that is compared (--threads). Peak memory, of two steps in a process of its own: above the weights on the CPU, in
all on CUDA, where one that runs out of memory gets half the micro-batch and twice the accumulation. The last line is
the same as JSON.
"""

import argparse
import gc
import json
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

from ours import our_stepper
from plain import Plain, plain_step

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.batch import Batch
from train.machine.device import autocast, device_name, pick_device, resolve_precision, synchronize

SIZES = {
    "small": (ModelConfig(family="gpt2", n_layer=4, n_head=4, d_model=256, seq_len=256), 8192),
    "gpt2": (ModelConfig(family="gpt2", n_layer=12, n_head=12, d_model=768, seq_len=1024), 50257),
}
OPTIM = OptimConfig(name="adamw", lr=6e-4, beta1=0.9, weight_decay=0.1, eps=1e-8)
OTHERS_BYTES = 6 << 30  # left free on CUDA while one's micro-batch is looked for: the weights of the others come later


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
    stepper = our_stepper(config, OPTIM, TrainConfig(compile=arguments.compile), vocab_size, device)
    batches = Random(arguments, device)
    return lambda: stepper.step(batches, arguments.accumulation).loss


STEPS = {"plain": partial(other_step, False), "by hand": partial(other_step, True), "ours": our_step}


def seconds(step: Callable[[], Tensor], steps: int, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the one before it used is in pieces of other sizes
        step()
    synchronize(device)
    began = clock()
    for _ in range(steps):
        step()
    synchronize(device)
    return clock() - began


def halved(arguments: argparse.Namespace, times: int) -> argparse.Namespace:
    """The same tokens a step, in micro-batches of half the size, `times` times."""
    micro_batch, accumulation = arguments.micro_batch >> times, arguments.accumulation << times
    return argparse.Namespace(**vars(arguments) | {"micro_batch": micro_batch, "accumulation": accumulation})


def peak_mib(name: str, arguments: argparse.Namespace) -> tuple[float, int]:
    """MiB, and how often the micro-batch was halved. In a process of its own, since a process's peak only grows."""
    device = pick_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = max(0.5 * free, free - OTHERS_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())
        times = 0
        while not fits(name, halved(arguments, times), device):
            times += 1
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20, times
    step = STEPS[name](arguments, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 0


def fits(name: str, arguments: argparse.Namespace, device: torch.device) -> bool:
    """Whether two steps do not run out of memory; the smallest micro-batch raises what it meets."""
    try:
        step = STEPS[name](arguments, device)
        for _ in range(2):
            step()
    except RuntimeError as error:
        if "out of memory" not in str(error) or arguments.micro_batch % 2:
            raise
        return False
    return True


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
    peaks, own = {}, {}
    for name in STEPS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name], times = pool.submit(peak_mib, name, arguments).result()
        own[name] = halved(arguments, times)
    steps = {name: make(own[name], device) for name, make in STEPS.items()}
    first = {name: step().item() for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, arguments.steps, device))
    found = {}
    for name in steps:
        rate, micro_batch = tokens / statistics.median(taken[name]), own[name].micro_batch
        pairs = [theirs / ours for theirs, ours in zip(taken[name], taken["ours"], strict=True)]
        found[name] = {
            "tok_per_s": round(rate, 1),
            "ours_is_faster": round(statistics.median(pairs), 3),
            "least": round(min(pairs), 3),
            "most": round(max(pairs), 3),
            "peak_mib": round(peaks[name], 1),
            "micro_batch": micro_batch,
        }
        at = f"   {micro_batch} at once" if micro_batch != arguments.micro_batch else ""
        print(f"{name:<7} {rate:10,.0f} tok/s   peak {peaks[name]:8,.0f} MiB   first loss {first[name]:.3f}{at}")
    for name in ("plain", "by hand"):
        ratio, memory = found[name]["ours_is_faster"], peaks["ours"] / peaks[name]
        print(f"ours is {ratio:.2f}x as fast as {name}, with {memory:.2f}x of its peak memory")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
