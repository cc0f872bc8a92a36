"""What `gpu.py` measures. Each function runs in a process of its own and returns one row of figures, or several.

The device is waited for before every look at a clock.
"""

import gc
import mmap
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from ours import our_stepper
from recipes import SCALES, recipe, run

from pipeline.config import Recipe
from pipeline.home.layout import Layout
from shards import TokenFolder
from train.config import TrainConfig
from train.data.batch import Batch
from train.data.loader import Stats, TokenLoader
from train.data.windows import FolderWindows
from train.machine.compile import compiled_graphs
from train.machine.device import memory_used, pick_device, resolve_precision, synchronize
from train.micro_batch import Fit, best_fit
from train.telemetry.meter import Meter
from train.telemetry.power import gpu_power

Row = dict[str, Any]
SMOKE_SEQUENCES, SMOKE_STEPS = 8, 3
ROUND_SECONDS, ROUND_STEPS, ROUNDS = 3.0, 5, 6
PROFILED_STEPS, PROFILED_ROWS = 5, 25
EVALUATIONS = 8  # of a recipe, and one before its first step
BLOCK_BYTES = 16 << 20


class Setup(NamedTuple):
    """The recipe whose step is measured, its home and token folder, the sequences at once, and whether it is a try."""

    recipe: Recipe
    home: Path
    folder: Path
    micro_batch: int
    small: bool


class Resident:
    """One batch of the loader's, again and again: it is on the device already."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self) -> Batch:
        return self.batch

    def stats(self) -> Stats:
        return Stats(0.0, 0.0, 0, 0)


class Step:
    """The recipe's step with its real loader. `changes` are of the recipe's [train] table."""

    def __init__(self, setup: Setup, **changes: object) -> None:
        self.model, self.micro_batch = setup.recipe.model, setup.micro_batch
        self.train = msgspec.structs.replace(setup.recipe.train, **changes)
        self.device, self.tokens = pick_device(), TokenFolder(setup.folder)
        self.vocab_size = self.tokens.tokenizer.vocab_size
        self.stepper = our_stepper(self.model, setup.recipe.optim, self.train, self.vocab_size, self.device)
        self.stepper.optimizers.schedule(0, 1000)
        self.accumulation = self.train.batch_tokens // self.model.seq_len // self.micro_batch

    def loader(self) -> TokenLoader:
        windows = FolderWindows.of(self.tokens, "train", self.model.seq_len, self.train.seed)
        return TokenLoader(windows, self.micro_batch, device=self.device, documents=self.train.document_mask)

    def meter(self) -> Meter:
        precision = resolve_precision(self.train, self.device)
        return Meter(self.model, self.vocab_size, self.device, precision, gpu_power([self.device]))

    def steps(self, source: TokenLoader | Resident, count: int) -> None:
        for _ in range(count):
            self.stepper.step(source, self.accumulation)
        synchronize(self.device)

    def timed(self, meter: Meter, source: TokenLoader | Resident, count: int) -> Row:
        meter.begin(0, 0, source.stats())
        self.steps(source, count)
        return meter.read(count, count * self.train.batch_tokens, source.stats())


def find_fit(setup: Setup) -> Fit:
    """The finder's answer, which is kept in the home."""
    model, optim, train = setup.recipe.model, setup.recipe.optim, setup.recipe.train
    vocab_size = TokenFolder(setup.folder).tokenizer.vocab_size
    return best_fit(model, optim, train, vocab_size, pick_device(), Layout(setup.home).fits)


def smoke(setup: Setup) -> Row:
    """The same few steps from the same weights, uncompiled and compiled."""
    setup = setup._replace(micro_batch=SMOKE_SEQUENCES)
    losses, step_ms, figures = [], [], {}
    for kind, compiled in (("eager", "off"), ("compiled", setup.recipe.train.compile)):
        step = Step(setup, compile=compiled)
        memory_used(step.device)
        found, taken = [], []
        with step.loader() as loader:
            for i in range(SMOKE_STEPS):
                step.stepper.optimizers.schedule(i, 1000)
                synchronize(step.device)
                began = time.perf_counter()
                loss = step.stepper.step(loader).loss
                synchronize(step.device)
                taken.append(1000 * (time.perf_counter() - began))
                found.append(loss.item())
        losses.append(found)
        step_ms.append(taken)
        figures |= {f"{kind}_step_ms": round(min(taken[1:]), 2), f"{kind}_loss": round(found[-1], 5)}
        figures |= {f"{kind}_memory_gb": round(memory_used(step.device) / 1e9, 3)}
        figures["graphs"] = compiled_graphs(step.stepper.model)
        still = [each for each in (step.stepper.model.compiled_hidden, step.stepper.model.compiled_softmax) if each]
        del step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "micro_batch": SMOKE_SEQUENCES,
        "steps": SMOKE_STEPS,
        "loss_difference_most": round(max(abs(a - b) for a, b in zip(*losses, strict=True)), 7),
        "compile_s": round((step_ms[1][0] - min(step_ms[1][1:])) / 1000, 2),
        "stayed_compiled": bool(still) and all(getattr(each, "is_compiled", False) for each in still),
        **figures,
    }


def training(setup: Setup, seconds: float, *, eager_loss: bool = False, **changes: object) -> Row:
    """The recipe's step with the real loader, in several rounds; `seconds` bound how many."""
    began = time.perf_counter()
    step = Step(setup, **changes)
    if eager_loss:
        step.stepper.model.compiled_softmax = None
    with step.loader() as loader, step.meter() as meter:
        first = step.timed(meter, loader, 1)["step_ms"] / 1000
        warm = step.timed(meter, loader, 2)["step_ms"] / 1000
        count, rounds = planned(setup, warm, seconds - (time.perf_counter() - began))
        rows = [step.timed(meter, loader, count) for _ in range(rounds)]
    pieces = step.stepper.pieces  # more than one where the memory ran out
    sizes = {"micro_batch": setup.micro_batch // pieces, "accumulation": step.accumulation * pieces}
    return {**medians(rows), **sizes, "rounds": rounds, "round_steps": count, "first_step_s": round(first, 2)}


def planned(setup: Setup, step_seconds: float, seconds: float) -> tuple[int, int]:
    """Steps of a round, and rounds: at least two, and no more than fit in three quarters of `seconds`."""
    if setup.small:
        return 2, 2
    count = max(1, min(ROUND_STEPS, int(ROUND_SECONDS / step_seconds)))
    return count, max(2, min(ROUNDS, int(0.75 * seconds / (count * step_seconds))))


def medians(rows: list[Row]) -> Row:
    """One row of several rounds' rows."""

    def middle(key: str) -> float:
        return round(statistics.median(row[key] for row in rows), 3)

    step_ms = [row["step_ms"] for row in rows]
    watts = {"watts": middle("watts")} if all("watts" in row for row in rows) else {}
    return {
        "tok_per_s": middle("tok_per_s"),
        "mfu_percent": middle("mfu_percent"),
        "step_ms": middle("step_ms"),
        "step_ms_least": min(step_ms),
        "step_ms_most": max(step_ms),
        "stall_percent_most": max(row["stall_percent"] for row in rows),
        "memory_gb": max(row["memory_gb"] for row in rows),
        **watts,
    }


def profile(setup: Setup, path: Path) -> Row:
    """The profiler's table of some steps, written to `path`."""
    step = Step(setup)
    on_gpu = step.device.type == "cuda"
    gpu = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with step.loader() as loader:
        step.steps(loader, 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *gpu]) as profiler:
            step.steps(loader, PROFILED_STEPS)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    table = averages.table(sort_by=by, row_limit=PROFILED_ROWS, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table)
    return {"steps": PROFILED_STEPS, "micro_batch": setup.micro_batch, "accumulation": step.accumulation}


def loading(setup: Setup, seconds: float) -> list[Row]:
    """Steps with the loader, with a resident batch, and with the loader and no token in the page cache, in turns."""
    began = time.perf_counter()
    step = Step(setup)
    with step.loader() as warm, step.loader() as cold, step.meter() as meter:
        sources = {"loader": warm, "resident batch": Resident(warm.next()), "loader, files not cached": cold}
        step.steps(warm, 1)
        step_seconds = step.timed(meter, warm, 2)["step_ms"] / 1000
        left = (seconds - (time.perf_counter() - began)) / len(sources)
        count, rounds = planned(setup, step_seconds, left)
        taken: dict[str, list[Row]] = {name: [] for name in sources}
        names, waits = list(sources), 0
        for turn in range(rounds):
            for name in names[turn % 3 :] + names[: turn % 3]:
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
                if sources[name] is cold:
                    drop_cached(step.tokens)
                taken[name].append(step.timed(meter, sources[name], count))
                if sources[name] is cold:
                    waits += resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
                    read_through(step.tokens)
    rows = []
    for name in names:
        pairs = zip(taken[name], taken["resident batch"], strict=True)
        differences = [100 * (mine["step_ms"] / other["step_ms"] - 1) for mine, other in pairs]
        row = {"measurement": name, **medians(taken[name])}
        if name != "resident batch":
            row["slower_percent"] = round(statistics.median(differences), 3)
            row |= {"slower_least": round(min(differences), 3), "slower_most": round(max(differences), 3)}
        if sources[name] is cold:
            row["disk_waits"] = waits
        rows.append(row | {"micro_batch": setup.micro_batch, "rounds": rounds, "round_steps": count})
    return rows


def drop_cached(tokens: TokenFolder) -> None:
    """Have the system forget what it holds of the training tokens; pages that a map still shows would stay."""
    for shard in tokens.shards("train"):
        if hasattr(os, "posix_fadvise"):
            shard._map.madvise(mmap.MADV_DONTNEED)  # its pages leave the map
            with shard.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(tokens: TokenFolder) -> None:
    """Have the system hold the training tokens again."""
    for shard in tokens.shards("train"):
        with shard.path.open("rb") as file:
            while file.read(BLOCK_BYTES):
                pass


def learned(setup: Setup, name: str, tokens: int, seconds: float, settings: tuple[str, ...]) -> Row:
    """What the recipe `name` of recipes.py has learned from `tokens` tokens of the folder, with one seed."""
    began = time.monotonic()
    scale = SCALES["small" if setup.small else "gpt2"]
    seq_len = next(int(each.partition("=")[2]) for each in scale.sizes if each.startswith("model.seq_len="))
    sequences, steps = scale.many // seq_len, tokens // scale.many
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0 and size <= setup.micro_batch]
    own = (f"train.micro_batch={max(sizes)}", f"train.eval_every={max(1, steps // EVALUATIONS)}")
    evaluated = [name for name in TrainConfig.__struct_fields__ if name.endswith("eval_tokens")]
    own += tuple(f"train.{name}={4096 if setup.small else 524_288}" for name in evaluated)
    wanted = (*recipe(name, scale, tokens, 1.0), *settings, *own)
    curve = run(setup.home, setup.folder.name, f"bench-{name}", wanted, began + seconds)
    return {
        "tokens": curve[-1][0],
        "val_loss": round(curve[-1][1], 4),
        "complete": curve[-1][0] >= steps * scale.many,
        "epochs": round(curve[-1][0] / len(TokenFolder(setup.folder).stream("train")), 2),
        "seeds": 1,
        "micro_batch": max(sizes),
        "seconds": round(time.monotonic() - began, 1),
        "curve": [(tokens, round(loss, 4)) for tokens, loss in curve],
    }
