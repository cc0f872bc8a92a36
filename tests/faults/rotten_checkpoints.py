"""Checkpoints that changed after they were written: bits, blocks, lengths, names, lists of hashes, whole files.

    python -P tests/faults/rotten_checkpoints.py --count 1000 [--seed N]

Each corruption hits the newest of three checkpoints, or swaps something between it and the one before. What is loaded
afterwards must be, to the last bit, the newest one that was left alone, with a warning that names each one passed over.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from train.data.windows import LoaderState
from train.state import checkpoint as checkpoints
from train.state.checkpoint import FILES, SUMS, Best, Checkpoint, Progress

STEPS = (10, 20, 30)
BLOCK = 4096


def make(step: int) -> Checkpoint:
    """A checkpoint of about 60 kB."""
    generator = torch.Generator().manual_seed(step)
    data = LoaderState(
        position=step, windows=99, seq_len=8, seed=0, order="shuffled", order_version=1, fingerprint="00" * 32
    )
    progress = Progress(
        step=step,
        tokens=64 * step,
        data=data,
        recipe="00" * 32,
        parts=1,
        best=Best(step, 1 / step, 640),
    )
    weights = {"embed.weight": torch.randn(64, 64, generator=generator), "norm": torch.randn(64, generator=generator)}
    state = {"0.0.exp_avg": torch.randn(64, 128, generator=generator), "loss_sum": torch.tensor(step / 3)}
    return Checkpoint(progress, weights, state)


def same(found: Checkpoint, expected: Checkpoint) -> bool:
    """Whether two checkpoints are equal to the last bit."""
    tensors = ((found.model, expected.model), (found.state, expected.state))
    return found.progress == expected.progress and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in tensors
    )


Corruption = Callable[[random.Random, Path, Path], bool]  # of (newest, before); whether the one before was hit too


def _change(dice: random.Random, newest: Path, change: Callable[[bytes], bytes]) -> None:
    """Change one file, for sure."""
    while True:
        file = newest / dice.choice((*FILES, SUMS))
        before = file.read_bytes()
        after = change(before)
        if after != before:
            file.write_bytes(after)
            return


def flip(dice: random.Random, newest: Path, _: Path) -> bool:
    def change(data: bytes) -> bytes:
        at = dice.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]

    _change(dice, newest, change)
    return False


def zero(dice: random.Random, newest: Path, _: Path) -> bool:
    def change(data: bytes) -> bytes:
        at = dice.randrange(0, len(data), BLOCK)
        return data[:at] + bytes(min(BLOCK, len(data) - at)) + data[at + BLOCK :]

    _change(dice, newest, change)
    return False


def truncate(dice: random.Random, newest: Path, _: Path) -> bool:
    _change(dice, newest, lambda data: data[: dice.randrange(len(data))])
    return False


def append(dice: random.Random, newest: Path, _: Path) -> bool:
    _change(dice, newest, lambda data: data + dice.choice((b"\0", b"\n", b" ", data)))
    return False


def remove(dice: random.Random, newest: Path, _: Path) -> bool:
    (newest / dice.choice((*FILES, SUMS))).unlink()
    return False


def swap_files(dice: random.Random, newest: Path, before: Path) -> bool:
    name = dice.choice((*FILES, SUMS))
    kept = (newest / name).read_bytes()
    shutil.copyfile(before / name, newest / name)
    (before / name).write_bytes(kept)
    return True


def swap_names(dice: random.Random, newest: Path, before: Path) -> bool:
    aside = newest.with_name("aside")
    newest.rename(aside)
    before.rename(newest)
    aside.rename(before)
    return True


def take_over(dice: random.Random, newest: Path, before: Path) -> bool:
    """Some files of the one before, and their hashes, but for one."""
    names = dice.sample(FILES, dice.randrange(1, len(FILES)))
    for name in names:
        shutil.copyfile(before / name, newest / name)
    ours, theirs = ((path / SUMS).read_text().splitlines() for path in (newest, before))
    lines = [their if our.split()[1] in names[1:] else our for our, their in zip(ours, theirs, strict=True)]
    (newest / SUMS).write_text("".join(f"{line}\n" for line in lines))
    return False


def edit_sums(dice: random.Random, newest: Path, before: Path) -> bool:
    lines = (newest / SUMS).read_bytes().splitlines(keepends=True)
    at = dice.randrange(len(lines))
    edits: tuple[Callable[[], list[bytes]], ...] = (
        lambda: lines[:at] + lines[at + 1 :],
        lambda: [*lines, lines[at]],
        lambda: lines[::-1],
        lambda: [line.upper() if i == at else line for i, line in enumerate(lines)],
        lambda: [line.replace(b"  ", b" *") if i == at else line for i, line in enumerate(lines)],
        lambda: [line.replace(b"\n", b"\r\n") if i == at else line for i, line in enumerate(lines)],
        lambda: [b"0" * 64 + line[64:] if i == at else line for i, line in enumerate(lines)],
    )
    (newest / SUMS).write_bytes(b"".join(dice.choice(edits)()))
    return False


CORRUPTIONS: tuple[Corruption, ...] = (
    *(flip, zero, truncate, append, remove),
    *(swap_files, swap_names, take_over, edit_sums),
)


class Heard(logging.Handler):
    """All warnings since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said += record.getMessage()


def strike(good: Path, scratch: Path, corrupt: Corruption, dice: random.Random, heard: Heard) -> str:
    """One corruption of a copy of `good`: what is wrong with what was loaded, or nothing."""
    shutil.copytree(good, scratch)
    try:
        names = [scratch / f"step-{step:06}" for step in STEPS]
        both = corrupt(dice, names[2], names[1])
        passed = names[1:] if both else names[2:]
        heard.said = ""
        found = checkpoints.load_latest(scratch)
        expected = make(STEPS[0] if both else STEPS[1])
        if found is None or not same(found, expected):
            return f"loaded {found and found.progress}, expected step {expected.step}"
        silent = [path.name for path in passed if path.name not in heard.said]
        return f"passed over silently: {silent}" if silent else ""
    finally:
        shutil.rmtree(scratch)


def rot(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """`count` corruptions: how many of each kind, and the faults."""
    dice, heard = random.Random(seed), Heard()
    logger = logging.getLogger("train.state.checkpoint")
    logger.addHandler(heard)
    logger.propagate = False
    tried: Counter[str] = Counter()
    faults = []
    try:
        good = folder / "good"
        for step in STEPS:
            checkpoints.save(good, make(step), keep=len(STEPS))
        for i in range(count):
            corrupt = CORRUPTIONS[i % len(CORRUPTIONS)]
            tried[corrupt.__name__] += 1
            if wrong := strike(good, folder / "rotten", corrupt, dice, heard):
                faults.append(f"{corrupt.__name__}, number {i}: {wrong}")
    finally:
        logger.removeHandler(heard)
        logger.propagate = True
    return tried, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="corruptions [default: 1000]")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tried, faults = rot(options.count, options.seed, Path(folder))
    print(f"{tried.total()} corruptions, {dict(tried)}, {len(faults)} silently loaded or wrong, ", end="")
    print(f"{time.perf_counter() - began:.0f} s")
    for fault in faults:
        print(f"FAULT (seed {options.seed}): {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
