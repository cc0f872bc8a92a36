"""One card in one command, in nine minutes at most: make bench-gpu [SET="corpus.files=texts/*.parquet"]

    python -P tests/benchmarks/gpu.py [--set corpus.kind=files --set corpus.files=...] [--small]

Prints the card; our training of the `overnight` model with the real loader (tok/s, MFU, memory, watts), and the same
with one batch that lies on the card already, which says what loading costs; how long compiling takes; our GPT-2 step
against a plain eager one and against one by hand (tests/benchmarks/train.py); and what each recipe has learned after 5,
10 and 20 M tokens of real text (tests/benchmarks/recipes.py), or fewer where the card is slow. `--small` is a small
model of it all, to try the command itself on any machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipeline.config import load
from pipeline.layout import Layout
from pipeline.stages import Pipeline
from pipeline.terminal import Terminal
from train.compile import compile_model, wants_compile
from train.device import autocast, device_name, loss_scaler, pick_device, resolve_precision
from train.fitting import best_fit
from train.loader import Batch, Stats, TokenLoader
from train.meter import Meter
from train.model import Model
from train.optim import Optimizers
from train.power import card_power
from train.step import Stepper
from train.windows import FolderWindows

HERE = Path(__file__).parent
TEXT = ("corpus.name=python-docs", "tokens.tokenizer=gpt2", "tokens.val_fraction=0.02", "tokens.max_tokens=0")
SMALL = ("model.n_layer=2", "model.n_head=2", "model.d_model=64", "model.seq_len=64", "train.batch_tokens=1024")
ROUNDS, STEPS = 4, 5
RECIPES_SECONDS = 240.0
NOTHING = Stats(0.0, 0.0, 0, 0)


class Resident:
    """One batch of the loader's, again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self) -> Batch:
        return self.batch


def train(settings: tuple[str, ...], home: Path, folder: Path) -> float:
    """The overnight model's figures; returns its rate in tokens a second."""
    recipe, device = load("overnight", settings)[1], pick_device()
    precision = resolve_precision(recipe.train, device)
    from shards import TokenFolder

    tokens = TokenFolder(folder, verify="hash")
    vocab_size = tokens.tokenizer.vocab_size
    fit = best_fit(recipe.model, recipe.optim, recipe.train, vocab_size, device, Layout(home).fits)
    windows = FolderWindows.of(tokens, "train", recipe.model.seq_len, recipe.train.seed)
    model = Model(recipe.model, vocab_size).to(device)
    if wants_compile(recipe.train, device):
        compile_model(model)
    optimizers = Optimizers(model, recipe.optim)
    scaler = loss_scaler(device, precision)
    stepper = Stepper(model, optimizers, recipe.optim.clip, lambda: autocast(device, precision), scaler)
    accumulation = recipe.train.batch_tokens // recipe.model.seq_len // fit.micro_batch
    step_tokens = recipe.train.batch_tokens
    optimizers.schedule(0, 1000)
    power = card_power([device])
    with (
        TokenLoader(windows, fit.micro_batch, device=device) as loader,
        Meter(recipe.model, vocab_size, device, precision, power) as meter,
    ):
        resident = Resident(loader.next())

        def steps(source: Resident | TokenLoader, count: int) -> dict[str, float]:
            stats = loader.stats if source is loader else lambda: NOTHING
            meter.begin(0, 0, stats())
            for _ in range(count):
                result = stepper.step(source, accumulation)
            result.loss.item()  # waits for the device
            return meter.read(count, count * step_tokens, stats())

        began = time.perf_counter()
        steps(resident, 1)
        first = time.perf_counter() - began
        steps(loader, 2)
        rounds = [(steps(loader, STEPS), steps(resident, STEPS)) for _ in range(ROUNDS)]
    real, still = ([each[i] for each in rounds] for i in (0, 1))
    step_ms = [sorted(each["step_ms"] for each in side)[ROUNDS // 2] for side in (real, still)]
    last, rate = real[-1], 1000 * step_tokens / step_ms[0]
    mfu, watts = (
        last["mfu_percent"] * last["step_ms"] / step_ms[0],
        f", {last['watts']:.0f} W" if "watts" in last else "",
    )
    waits, costs = max(each["stall_percent"] for each in real), 100 * (1 - step_ms[1] / step_ms[0])
    print(f"micro-batch   {fit.micro_batch} of {step_tokens // recipe.model.seq_len} sequences a step")
    print(f"training      {rate:,.0f} tok/s, {last['memory_gb']:.2f} GB{watts}")
    print(f"MFU           {mfu:.1f} % of {meter.peak.flops / 1e12:.4g} TFLOP/s ({meter.peak.source})")
    print(f"stall         {waits:.4f} % at most, as the loader counts its waits")
    print(f"control       {costs:+.3f} %: a step takes {step_ms[0]:.2f} ms, {step_ms[1]:.2f} with one resident batch")
    print(f"first step    {first:.1f} s, {first - step_ms[1] / 1000:.1f} s of it compiling and warming up", flush=True)
    return rate


def other(script: str, *arguments: object) -> str:
    """What another benchmark prints, in a process of its own: the card's memory is its alone."""
    command = [sys.executable, "-P", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = pick_device()
    print(f"card          {device_name(device)}, torch {torch.__version__}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        settings = (*TEXT, *(SMALL if arguments.small else ()), *arguments.settings)
        recipe = load("overnight", settings)[1]
        (folder,) = Pipeline(Layout(home), "overnight", recipe, Terminal()).prepare()
        rate = train(settings, home, folder)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        size = ("--size", "small") if arguments.small else ("--size", "gpt2", "--micro-batch", 8, "--accumulation", 4)
        print(other("train.py", *size, "--rounds", 3), end="", flush=True)
        fit = rate * RECIPES_SECONDS / 3 / 2  # three recipes; half the time is evaluation and compiling
        tokens = next((size for size in (20_000_000, 10_000_000) if size <= fit), 5_000_000)
        scale = ("--scale", "small", "--length", 32_768) if arguments.small else ("--scale", "gpt2", "--length", tokens)
        only = ("--only", "stacked", "adamw", "overnight", "--share", 1, "--seeds", 1)
        found = other("recipes.py", "--home", home, "--tokens", folder.name, *scale, *only)
        curves = json.loads(found.splitlines()[-1])["curves"]
    print("loss after   " + "".join(f"{name:>12}" for name in curves))
    longest = min(rows[-1][0] for rows in curves.values())
    for part in (0.25, 0.5, 1.0):
        near = [min(rows, key=lambda row: abs(row[0] - part * longest)) for rows in curves.values()]
        print(f"{near[0][0] / 1e6:8.1f} M   " + "".join(f"{loss:12.4f}" for _, loss in near))
    print(f"all of this took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
