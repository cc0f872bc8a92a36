"""One training of 40 steps, killed at every step and at every call of every save that changes the disk.

    python -P tests/faults/train_kills.py --count 200

A point is a step boundary, the n-th call of the k-th save that makes, syncs, renames or removes something, a byte of a
file at which its writing breaks off, or the beginning or the end of an evaluation, when the checkpoint of its step is
there. Each point has a run of its own: it is killed there, run again to its end, and its losses, samples and final
weights are compared bit for bit with those of a run that nobody disturbed. The runs are forked from one warm
interpreter, which has started no thread and computed nothing.
"""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch._dynamo  # noqa: F401  # loaded by what lays a model out on the meta device; once here, not in every run
from harness import TINY, litter, pipeline_of, results, stdlib_texts
from msgspec.structs import replace

import prepare.build
import prepare.corpus.pin  # noqa: F401
from pipeline import training
from pipeline.config import Recipe, load
from shards.atomic import sha256_of
from train import loop
from train.session import Output, Session
from train.state import checkpoint

STEPS = 40
SETTINGS = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=3",
    "train.eval_every=8",
    "train.sample_every=10",
    "train.log_every=1",
    "model.n_layer=1",
    "model.dropout=0.1",
    'optim.name="muon"',
)
CALLS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}  # as Python's audit events call them
Point = tuple[str, int, int]  # ("step", step, 0), ("call", save, call), ("byte", save, byte), ("eval", number, 0 or 1)


class Deadly:
    """Counts what a run does, and ends the process in the middle of it at `point`."""

    def __init__(self, point: Point | None) -> None:
        self.point = point
        self.saves = self.calls = self.evaluations = 0
        self.found: list[Point] = []
        write, fsync, save, check = checkpoint._write, os.fsync, checkpoint.save, loop._ending
        evaluate = loop._evaluate

        def saved(*arguments: Any) -> Path:
            self.saves, self.calls = self.saves + 1, 0
            return save(*arguments)

        def written(tensors: Any, path: Path) -> None:
            if path.name.startswith("model"):
                self.found.append(("byte", self.saves, 4096))
            if self.point and self.point[:2] == ("byte", self.saves):
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.point[2], resource.RLIM_INFINITY))
            write(tensors, path)

        def synced(descriptor: int) -> None:
            self._called()
            fsync(descriptor)

        def stepped(run: Session, *arguments: Any) -> Any:
            self._reached(("step", run.state.step, 0))
            return check(run, *arguments)

        def evaluated(run: Session, out: Output, tokens: int) -> Any:
            self.evaluations += 1
            if self.point and self.point[:2] == ("eval", self.evaluations):
                out.saver.wait()
            self._reached(("eval", self.evaluations, 0))
            found = evaluate(run, out, tokens)
            self._reached(("eval", self.evaluations, 1))
            return found

        checkpoint.save, checkpoint._write, os.fsync = saved, written, synced  # type: ignore[assignment]
        loop._evaluate = evaluated
        loop._ending = stepped
        sys.addaudithook(self._heard)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # past its limit the kernel ends the process at that very byte

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in CALLS and writes:
            self._called()

    def _called(self) -> None:
        if threading.current_thread().name == "saver":
            self.calls += 1
            self._reached(("call", self.saves, self.calls))

    def _reached(self, point: Point) -> None:
        self.found.append(point)
        if point == self.point:
            os.kill(os.getpid(), signal.SIGKILL)


class Gate:
    """The runs of one recipe under one home."""

    def __init__(self, scratch: Path) -> None:
        self.home, self.scratch = scratch / "home", scratch
        self.recipe = recipe(scratch)
        self.faults: list[str] = []
        self.kills: Counter[str] = Counter()
        self.points: list[Point] = []
        status = self._forked(lambda: self._train("calm", None))
        if status != 0:
            raise SystemExit(f"the undisturbed run failed:\n{(scratch / 'log').read_text()}")
        self.points = sorted({tuple(point) for point in json.loads((scratch / "points").read_text())})
        self.right = self._end_of("calm")

    def strike(self, point: Point) -> None:
        """Kill a run at `point`, run it again, compare."""
        name = "-".join(map(str, point))
        killed = self._forked(lambda: self._train(name, point))
        if killed not in (signal.SIGKILL, signal.SIGXFSZ):
            self.faults.append(f"{name}: it was not killed: status {killed}")
            return
        self.kills[point[0]] += 1
        again = self._forked(lambda: self._train(name, None))
        if again != 0:
            self.faults.append(f"{name}: run again it ended with status {again}")
        elif self._end_of(name) != self.right:
            self.faults.append(f"{name}: its end is not that of an undisturbed run")
        elif left := litter(self.home / "runs" / name):
            self.faults.append(f"{name}: litter: {left}")

    def _train(self, name: str, point: Point | None) -> None:
        deadly = Deadly(point)
        training.train(pipeline_of(self.recipe, self.home), name)
        (self.scratch / "points").write_text(json.dumps(deadly.found))

    def _end_of(self, name: str) -> dict[str, Any]:
        run = self.home / "runs" / name
        rows = [results(run / file) for file in ("metrics.jsonl", "samples.jsonl")]
        newest = checkpoint.load_latest(run / "checkpoints")
        assert newest is not None and newest.step == STEPS
        kept = [path.name for path in checkpoint.steps(run / "checkpoints")]
        sums = [sha256_of(file) for each in kept for file in sorted((run / "checkpoints" / each).glob("*.safetensors"))]
        progress = [checkpoint.check(run / "checkpoints" / each) for each in kept]
        return {
            "rows": rows,
            "kept": kept,
            "sums": sums,
            "best": (run / "checkpoints" / checkpoint.BEST).read_bytes(),
            "progress": [replace(each, seconds=0.0, energy_kwh=0.0) for each in progress],
            "result": json.loads((run / "receipt.json").read_text())["result"],
        }

    def _forked(self, do: Callable[[], None]) -> int:
        """The signal that ended the child, or its exit status."""
        child = os.fork()
        if child == 0:
            try:
                log = os.open(self.scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                do()
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def recipe(scratch: Path) -> Recipe:
    """The tiny recipe over the standard library's docstrings, prepared under `scratch`/home by a child."""
    texts, toml = scratch / "texts.jsonl", scratch / "killed.toml"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts()[:600]))
    toml.write_text(TINY.format(files=texts))
    return load(str(toml), SETTINGS)[1]


def spread(points: list[Point], count: int) -> list[Point]:
    """`count` of the points, evenly; all when there are fewer."""
    return points if count >= len(points) else [points[i * len(points) // count] for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="points, spread evenly over all [default: 200]")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        gate = Gate(Path(name))
        points = spread(gate.points, options.count)
        for i, point in enumerate(points, 1):
            gate.strike(point)
            if i % 20 == 0:
                print(f"{i} of {len(points)}, {time.perf_counter() - began:.0f} s", flush=True)
        print(f"{len(gate.points)} points, {gate.kills.total()} of them killed: {dict(gate.kills)}, ", end="")
        print(f"{len(gate.faults)} different, {time.perf_counter() - began:.0f} s")
        for fault in gate.faults:
            print(f"FAULT: {fault}")
    return 1 if gate.faults or gate.kills.total() < min(options.count, len(gate.points)) else 0


if __name__ == "__main__":
    sys.exit(main())
