"""Recipes on the same text: what each has learned after so many tokens, over seeds, and how many tokens it saves.

    python -P tests/benchmarks/recipes.py --home DIR --tokens FOLDER [--scale small|30m|gpt2] [--tune] [--seeds 1 2 3]

FOLDER is a token folder under DIR. Every recipe is a list of settings, so that what is compared here is what a person
can ask for. `--tune` tries the same number of learning rates for each (factors of its published ones) with a seed of
its own; the best of each goes into the comparison. Finished runs are not done again. `small` is for a CPU; its batches
are as far apart as the published ones (6 sequences and about 100).
"""

import argparse
import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

BOOK = ("model.family=gpt2", "model.tied=false", "model.init=torch", "optim.name=adamw", "optim.decay=all")
BOOK += ("optim.beta1=0.9", "optim.beta2=0.999", "optim.eps=1e-8")
COSINE = ("optim.schedule=cosine", "optim.final_lr=0.1")
RATES = ("lr", "embed_lr", "head_lr", "norm_lr")


class Scale:
    """The model's size and lengths. `tokens` is what the baseline is given, `few` and `many` its two batches."""

    def __init__(self, sizes: tuple[str, ...], heads: int, tokens: int, few: int, many: int, evals: int) -> None:
        self.sizes, self.heads, self.tokens, self.few, self.many, self.evals = sizes, heads, tokens, few, many, evals


SCALES = {
    "small": Scale(
        ("model.n_layer=4", "model.d_model=64", "model.seq_len=128",
         "train.eval_tokens=131072", "train.final_eval_tokens=131072"),
        4, 2_048_000, 256, 1024, 16,
    ),
    "30m": Scale(
        ("model.n_layer=6", "model.d_model=384", "model.seq_len=1024", "train.micro_batch=48",
         "train.eval_tokens=393216", "train.final_eval_tokens=393216"),
        6, 60_014_592, 6144, 98_304, 20,
    ),
    "gpt2": Scale(
        ("model.n_layer=12", "model.d_model=768", "model.seq_len=1024", "train.final_eval_tokens=1048576"),
        12, 20_004_864, 6144, 98_304, 20,
    ),
}  # fmt: skip


def recipe(name: str, scale: Scale, tokens: int, factor: float) -> tuple[str, ...]:
    """The settings of `name`, its learning rates multiplied by `factor`."""
    steps = tokens // (scale.few if name == "first" else scale.many)
    warm = f"optim.warmup_steps={steps // 20}"
    heads, modern_heads = f"model.n_head={scale.heads}", f"model.n_head={scale.heads // 2}"
    batch = f"train.batch_tokens={scale.few if name == 'first' else scale.many}"
    shared = (*scale.sizes, batch, f"train.steps={steps}", f"train.eval_every={max(1, steps // scale.evals)}")
    match name:
        case "first":  # the book's script as it was: part 28
            own = (*BOOK, heads, "model.qkv_bias=false", "model.dropout=0.1", "optim.weight_decay=0.1", "optim.clip=0")
            own += ("optim.schedule=constant", "optim.warmup_steps=0", f"optim.lr={4e-4 * factor}")
        case "stacked":  # its best: the stacked interventions
            own = (*BOOK, heads, "model.qkv_bias=true", "model.dropout=0", "optim.weight_decay=0.01", "optim.clip=3.5")
            own += (*COSINE, warm, f"optim.lr={1.4e-3 * factor}")
        case "gpt2-tuned":  # the preset's, but for the length of its warm-up
            own = (heads, "model.family=gpt2", "optim.name=adamw", "optim.beta1=0.9", "optim.eps=1e-8")
            own += ("optim.weight_decay=0.1", "optim.decay_fraction=1.0", "optim.final_lr=0.1")
            own += (warm, f"optim.lr={1.5e-3 * factor}")
        case "muon-gpt2" | "overnight":  # the preset's optimizer, on GPT-2's form for comparison and on its own
            form = ("model.family=gpt2", "model.tied=false", heads) if name == "muon-gpt2" else (modern_heads,)
            published = {"lr": 0.025, "embed_lr": 0.05, "head_lr": 0.004, "norm_lr": 0.015}
            own = (*form, f"optim.warmup_steps={min(20, max(2, steps // 20))}")
            own += tuple(f"optim.{key}={published[key] * factor:.6g}" for key in RATES)
        case _:
            raise ValueError(name)
    return (*shared, *own)


def run(
    home: Path, folder: str, name: str, settings: tuple[str, ...], until: float = math.inf
) -> list[tuple[int, float]]:
    """Train it, unless that is done, and return its validation losses: (tokens, nats a token).

    They end earlier when time.monotonic() reaches `until` before the last step.
    """
    import torch

    from pipeline import training
    from pipeline.config import load
    from pipeline.home.layout import Layout
    from pipeline.stages import Pipeline
    from pipeline.terminal import Terminal
    from shards.errors import OutOfTime
    from train.telemetry.metrics import read_rows

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    common = (f"tokens.folder={folder}", "train.tokens=0", "train.checkpoint_every=0", "train.sample_every=0")
    common += ("train.log_every=1000000", "train.prompts=[]")
    config = load("overnight", (*common, *settings))[1]
    layout = Layout(home)
    with suppress(OutOfTime):
        training.train(Pipeline(layout, "overnight", config, Terminal()), name, until=until)
    rows = read_rows(layout.run(name).metrics)
    return [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--tokens", required=True, help="a token folder under the home")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--length", type=int, default=0, help="tokens for the baseline; 0: as the scale says")
    parser.add_argument("--only", nargs="+", default=["first", "stacked", "muon-gpt2", "overnight"])
    parser.add_argument("--share", type=float, default=1 / 3, help="of the baseline's tokens, for the muon recipes")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rates", nargs="+", default=[], metavar="RECIPE=FACTOR", help="what a tuning has found")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    length = arguments.length or scale.tokens
    lengths = {name: length for name in arguments.only}
    lengths |= {name: int(length * arguments.share) for name in ("muon-gpt2", "overnight") if name in lengths}

    def curves(wanted: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], list[tuple[int, float]]]:
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
            futures = {}
            for name, factor, seed in wanted:
                settings = (*recipe(name, scale, lengths[name], factor), f"train.seed={seed}")
                title = f"{arguments.scale}-{name}-{lengths[name]}-x{factor:g}-seed{seed}"
                futures[name, factor, seed] = pool.submit(run, arguments.home, arguments.tokens, title, settings)
            return {key: future.result() for key, future in futures.items()}

    chosen = dict.fromkeys(lengths, 1.0) | {
        name: float(found) for name, found in (r.split("=") for r in arguments.rates)
    }
    if arguments.tune:
        tuning = curves([(name, factor, 0) for factor in arguments.factors for name in lengths])
        for name in lengths:
            tried = {factor: tuning[name, factor, 0][-1][1] for factor in arguments.factors}
            chosen[name] = min(tried, key=lambda factor: tried[factor])
            print(f"{name:<10} rates x", "  ".join(f"{factor:g}: {loss:.4f}" for factor, loss in tried.items()))
    found = curves([(name, chosen[name], seed) for seed in arguments.seeds for name in lengths])
    means = {}
    for name, tokens in lengths.items():
        each = [found[name, chosen[name], seed] for seed in arguments.seeds]
        means[name] = [(rows[0][0], statistics.mean(loss for _, loss in rows)) for rows in zip(*each, strict=True)]
        last = [rows[-1][1] for rows in each]
        spread = f"{statistics.mean(last):.4f} ({min(last):.4f} to {max(last):.4f})"
        print(f"{name:<10} {tokens / 1e6:8.2f} M tokens, rates x{chosen[name]:g}: {spread}")
    for name in ("first", "stacked"):
        for other in ("gpt2-tuned", "muon-gpt2", "overnight"):
            if name in means and other in means:
                target = means[name][-1][1]
                there = next((tokens for tokens, loss in means[other] if loss <= target), None)
                said = f"{there / 1e6:.2f} M tokens, {lengths[name] / there:.1f}x fewer" if there else "not reached"
                print(f"{name}'s last loss {target:.4f} is reached by {other} at {said}")
    print(json.dumps({"chosen": chosen, "curves": means}))


if __name__ == "__main__":
    main()
