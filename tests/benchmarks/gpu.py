"""What one GPU does, in four parts of at most eight minutes: make bench-gpu [PART="smoke step"] [SET="..."]

    python -P tests/benchmarks/gpu.py [--part smoke step loader recipes] [--set corpus.files=texts/*.parquet] [--small]

smoke    a few steps of the `overnight` model, compiled against eager: losses, seconds of compiling, graphs, memory
step     its training rate with the real loader (tok/s, MFU, memory, watts); with --profile FILE a table of the kernels;
         our GPT-2 step against a plain eager one and one by hand (train.py); the rate without the compiled loss, and
         without any compiling
loader   its step with the real loader, with one resident batch, and with token files that are not in the page cache
recipes  the validation loss of gpt2-tuned and overnight after equally many tokens (recipes.py)

Without --part, all four. Each measurement has a process of its own and each part a budget (--budget SECONDS): what does
not fit is left out and named at the end. Every result is a JSON line in --results; this run's are printed as Markdown.
Tokens, micro-batches and what was compiled are kept under --home for the next part. `train.micro_batch=64` does
without the finder; `--small` is a small model, to try the command itself on any machine.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # last: one of the scripts here is train.py
sys.path.append(str(Path(__file__).parents[1] / "support"))

import gpu_parts
from apart import Failed, apart, printed
from gpu_parts import Row, Setup

from pipeline.cli.options import ENVIRONMENT, split_settings
from pipeline.config import load
from pipeline.home.layout import Layout
from pipeline.stages import Pipeline
from pipeline.terminal import Terminal
from train.machine.device import device_name, pick_device

HERE = Path(__file__).parent
PARTS = ("smoke", "step", "loader", "recipes")
TEXT = ("tokens.tokenizer=gpt2", "tokens.val_fraction=0.02", "tokens.max_tokens=0")
SMALL = ("model.n_layer=1", "model.n_head=2", "model.d_model=32", "model.seq_len=64")
SMALL += ("train.batch_tokens=512", "train.micro_batch=4")
COMMON = ("date", "part", "card", "driver", "torch", "cuda", "command")
STEPPED = ("train.compile=", "train.precision=", "train.checkpoint_activations=")  # settings that recipes take over
FINDER_LEAVES, FALLBACK = 180.0, 16  # seconds of the budget; the micro-batch where the finder does not come to an end
RECIPE_SECONDS = 100.0  # of starting, compiling and saving, before and after the steps of one recipe
EVALUATED = 2_000_000  # tokens of training that take as long as a recipe's evaluations
SMALL_TOKENS, LEAST_TOKENS = 16_384, 3_000_000


class Session:
    """Measures while the part's budget lasts, keeps every row, and knows what was left out."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.small, self.home = arguments, arguments.small, arguments.home
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.failed = False
        given = any(each.startswith("corpus.files=") for each in arguments.settings)
        text = (*(("corpus.name=texts", "corpus.kind=files") if given else ("corpus.name=python-docs",)), *TEXT)
        self.recipe = load("overnight", (*text, *(SMALL if self.small else ()), *arguments.settings))[1]
        Layout(self.home).keep_compiled()
        self.device = pick_device()
        self.common = {
            "card": device_name(self.device),
            "driver": driver(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "command": shlex.join(["python", "-P", "tests/benchmarks/gpu.py", *sys.argv[1:]]),
        }
        self.part, self.began, self.rate = "", time.monotonic(), 0.0
        self.spare = 3.0 if self.small else 20.0  # seconds of starting and ending a process
        self.setup: Setup | None = None

    def run(self, part: str) -> None:
        """All of one part."""
        self.part = part
        setup = self.prepared()
        if part == "smoke":
            self.measure("compiled against eager", 30, lambda left: apart(left, gpu_parts.smoke, setup))
            return
        setup = self.fitted(setup)
        {"step": self.step, "loader": self.loader, "recipes": self.recipes}[part](setup)

    def left(self) -> float:
        """Seconds of the part's budget."""
        return self.arguments.budget - (time.monotonic() - self.began)

    def prepared(self) -> Setup:
        """The tokens, prepared once for all parts."""
        if self.setup is None:
            (folder,) = Pipeline(Layout(self.home), "overnight", self.recipe, Terminal()).prepare()
            self.setup = Setup(self.recipe, self.home, folder, self.recipe.train.micro_batch, self.small)
        return self.setup

    def fitted(self, setup: Setup) -> Setup:
        """With the micro-batch that the finder has found, once for all parts."""
        if setup.micro_batch:
            return setup
        began, seconds = time.monotonic(), max(self.left() - FINDER_LEAVES, 0.3 * self.left())
        try:
            fit = apart(seconds, gpu_parts.find_fit, setup)
            self.setup = setup._replace(micro_batch=fit.micro_batch)
            if rates := {f"at_{size}": round(rate, 1) for size, rate in fit.rates.items()}:
                self.keep({"measurement": "micro-batch", "micro_batch": fit.micro_batch, **rates})
        except (TimeoutError, Failed) as error:
            reason = str(error) or f"not done after {seconds:.0f} s"
            self.left_out.append(f"the finder: {reason}; {FALLBACK} sequences at once instead")
            self.setup = setup._replace(micro_batch=FALLBACK)
        print(f"micro-batch {self.setup.micro_batch}, found in {time.monotonic() - began:.0f} s", flush=True)
        return self.setup

    def step(self, setup: Setup) -> None:
        """Our training rate, where its time goes, our step against others', and what compiling gives."""
        if row := self.measure("training", 45, lambda left: apart(left, gpu_parts.training, setup, left - self.spare)):
            self.rate = row["tok_per_s"]
        if path := self.arguments.profile:
            self.measure("profile", 30, lambda left: apart(left, gpu_parts.profile, setup, path))
        self.measure("our GPT-2 step against others", 150, lambda left: self.others(setup, left))
        for name, changes in (("training, eager loss", {"eager_loss": True}), ("training, eager", {"compile": "off"})):

            def variant(left: float, changes: dict[str, Any] = changes) -> Row:
                return apart(left, gpu_parts.training, setup, left - self.spare, **changes)

            self.measure(name, 45, variant)

    def others(self, setup: Setup, left: float) -> list[Row]:
        """What train.py prints of our step and the others', as large as they fit."""
        size, batch, rounds = ("small", 4, 2) if self.small else ("gpt2", setup.micro_batch, 3)
        chosen = {"size": size, "micro-batch": batch, "accumulation": 1, "rounds": rounds}
        options = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        last = printed(left, [sys.executable, "-P", str(HERE / "train.py"), *options]).splitlines()[-1]
        return [{"measurement": f"GPT-2 {size}, {name}", **figures} for name, figures in json.loads(last).items()]

    def loader(self, setup: Setup) -> None:
        """What the real loader costs a step."""
        self.measure("loading", 60, lambda left: apart(left, gpu_parts.loading, setup, left - self.spare))

    def recipes(self, setup: Setup) -> None:
        """Two recipes after equally many tokens: as many as fit, by the rate measured."""
        settings = tuple(each for each in self.arguments.settings if each.startswith(STEPPED))
        if not self.rate and not self.small:
            row = self.measure("training", 45, lambda left: apart(left, gpu_parts.training, setup, min(left, 60)))
            self.rate = row["tok_per_s"] if row else 0.0
        tokens = SMALL_TOKENS if self.small else int(0.85 * self.rate * (self.left() / 2 - RECIPE_SECONDS)) - EVALUATED
        if tokens < LEAST_TOKENS and not self.small:
            self.left_out.append(f"recipes: at {self.rate:,.0f} tok/s, {self.left():.0f} s are too few for two of them")
            return
        for name, parts in (("gpt2-tuned", 2), ("overnight", 1)):
            shutil.rmtree(Layout(self.home).run(f"bench-{name}").root, ignore_errors=True)

            def learned(left: float, name: str = name, parts: int = parts) -> Row:
                until = left / parts - self.spare
                return apart(left, gpu_parts.learned, setup, name, tokens, until, settings)

            self.measure(name, RECIPE_SECONDS, learned)

    def measure(self, name: str, needs: float, work: Callable[[float], Any]) -> Any:
        """What `work` found in the seconds that are left, kept; None when they are fewer than `needs`, or it failed."""
        left = self.left()
        if left < (needs / 10 if self.small else needs):
            self.left_out.append(f"{self.part}, {name}: takes about {needs:.0f} s, {left:.0f} s were left")
            return None
        print(f"{self.part}: {name}, {left:.0f} s left", file=sys.stderr, flush=True)
        try:
            found = work(left)
        except TimeoutError:
            self.left_out.append(f"{self.part}, {name}: not done after the {left:.0f} s that were left")
            return None
        except Failed as error:
            self.failed = True
            self.left_out.append(f"{self.part}, {name}: failed: {error}")
            return None
        for row in found if isinstance(found, list) else [{"measurement": name, **found}]:
            self.keep(row)
        return found

    def keep(self, row: Row) -> None:
        """Append the row to the results, and to what is printed at the end."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows.append({"date": now, "part": self.part, **self.common, **row})
        results = self.arguments.results
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


def driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def markdown(rows: list[Row]) -> Iterator[str]:
    """The rows as docs/results.md has them: a table for each part, and the recipes' curves."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        yield f"\n## {part}"
        for alike in grouped(own):
            columns = list(dict.fromkeys(key for row in alike for key in row if key not in (*COMMON, "curve")))
            yield ""
            yield from table(columns, [[row.get(key, "") for key in columns] for row in alike])
        curves = {row["measurement"]: row["curve"] for row in own if "curve" in row}
        if curves:
            yield "\nNats per token on the way, one seed each:\n"
            at = list(dict.fromkeys(tokens for curve in curves.values() for tokens, _ in curve))
            losses = [dict(curve) for curve in curves.values()]
            cells = [[round(tokens / 1e6, 3), *(each.get(tokens, "") for each in losses)] for tokens in sorted(at)]
            yield from table(["M tokens", *curves], cells)


def grouped(rows: list[Row]) -> list[list[Row]]:
    """Neighbours that have most of their figures in common."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and len(row.keys() & groups[-1][0].keys() - {*COMMON}) > (len(row) - len(COMMON)) / 2:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def table(columns: list[str], cells: list[list[Any]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in cells:
        yield f"| {' | '.join(cell(each) for each in row)} |"


def cell(value: Any) -> str:
    """A number with its thousands apart, anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="TABLE.FIELD=VALUE")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="of each part")
    parser.add_argument("--home", type=Path, default=Path("data/bench"))
    parser.add_argument("--results", type=Path, default=Path("data/bench/results.jsonl"))
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where step writes the profiler's table")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    arguments.settings = [*split_settings(os.environ.get(ENVIRONMENT, "")), *arguments.settings]
    if not (arguments.small or torch.cuda.is_available()):
        parser.error("this machine has no GPU that torch can use (millpond doctor); --small tries the command on a CPU")
    session = Session(arguments)
    common = session.common
    print(f"{common['card']}, driver {common['driver']}, torch {common['torch']}, CUDA {common['cuda']}", flush=True)
    try:
        for part in session.arguments.part:
            session.run(part)
            print(f"{part} took {time.monotonic() - session.began:.0f} s", file=sys.stderr, flush=True)
            session.began = time.monotonic()
    finally:
        print(f"\n`{common['command']}`: {common['card']}, driver {common['driver']}, torch {common['torch']}")
        print("\n".join(markdown(session.rows)))
        for what in session.left_out:
            print(f"left out: {what}")
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    main()
