"""Two prepares of one recipe under one home, killed at random moments until so many kills have happened.

    python -P tests/faults/kills.py --count 200 [--hub] [--seed N]

Both are started, one of them or both get SIGKILL, the killed are started again. When both have ended well, the home is
compared with that of an undisturbed prepare, and the next one begins. What has been published is compared after every
kill too, while the other process goes on: a file under its name must be whole at any moment.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from harness import TINY, command, litter, parquet, stdlib_texts, tree
from local_hub import LocalHub

ORPHAN_SECONDS = 5.0
LONGEST = 120.0  # seconds for a process that nobody kills
FILES = 4


def local_recipe(folder: Path) -> Path:
    """A recipe of more than 40 parts from four files."""
    texts = stdlib_texts()
    for i in range(FILES):
        rows = (json.dumps({"text": text}) + "\n" for text in texts[i::FILES])
        (folder / f"{i}.jsonl").write_text("".join(rows))
    return _write(folder, TINY.format(files=folder / "*.jsonl"))


def hub_recipe(folder: Path, hub: LocalHub) -> Path:
    """The same texts in parquet files on `hub`, which takes its time."""
    texts = stdlib_texts()
    hub.commit("org/web", {f"sample/{i}.parquet": parquet(texts[i::FILES]) for i in range(FILES)})
    hub.slow = 0.05
    there = TINY.replace('kind = "files"', 'kind = "hub"\nrepo = "org/web"').format(files="sample/*.parquet")
    return _write(folder, there.replace('"bpe"\nvocab_size = 512', '"gpt2"'))


def _write(folder: Path, toml: str) -> Path:
    path = folder / "storm.toml"
    path.write_text(toml.replace("40_000", "5_000"))
    return path


@dataclass
class Storm:
    """What is prepared, where, and what has happened so far."""

    toml: Path
    scratch: Path
    seed: int
    environment: dict[str, str]
    kills: int = 0
    prepares: int = 0
    published: int = 0  # files seen under their names after a kill
    stages: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._killed: set[int] = set()  # their sessions
        self._calm = self.scratch / "calm"
        began = time.monotonic()
        done = self._start(self._calm)
        assert done.wait(LONGEST) == 0, self._log_of(done)
        self._longest_delay = 1.2 * (time.monotonic() - began)
        self._right = kept(self._calm)
        assert len([name for name in self._right if name.endswith(".bin")]) >= 40

    def rage(self, kills: int, progress: Callable[[str], None] = lambda _: None) -> None:
        """Go on until `kills` have happened and the prepare that was under way has ended; stop at a fault."""
        while self.kills < kills and not self.faults:
            home = self.scratch / f"home-{self.prepares}"
            self._until_done(home, kills)
            self.prepares += 1
            self._bury()
            if not self.faults:
                self._compare(home)
            progress(f"{self.prepares} prepares, {self.kills} kills, {dict(self.stages)}")
            if not self.faults:
                subprocess.run(["rm", "-rf", str(home)], check=True)

    def _until_done(self, home: Path, kills: int) -> None:
        both = [self._start(home), self._start(home)]
        while any(process.poll() is None for process in both) and not self.faults:
            alive = [process for process in both if process.poll() is None]
            if self.kills >= kills:
                for process in alive:
                    process.wait(LONGEST)
            else:
                self._wait(alive, self._random.uniform(0.0, self._longest_delay))
                for victim in self._random.choice((both[:1], both[1:], both)):
                    self._kill(victim, home)
                self._look(home)
                both = [self._start(home) if process.returncode == -signal.SIGKILL else process for process in both]
        for process in both:
            if process.returncode not in (0, -signal.SIGKILL):
                self.faults.append(f"{home.name}: exit code {process.returncode}:\n{self._log_of(process)}")

    def _start(self, home: Path) -> subprocess.Popen[bytes]:
        workers = self._random.choice((1, 2))
        arguments = command("prepare", self.toml, "--home", home, "--set", f"tokens.workers={workers}")
        log = (self.scratch / "log").open("wb")
        process = subprocess.Popen(arguments, env=self.environment, stderr=log, start_new_session=True)
        log.close()
        path = self.scratch / f"log-{process.pid}"
        (self.scratch / "log").rename(path)
        return process

    def _log_of(self, process: subprocess.Popen[bytes]) -> str:
        return (self.scratch / f"log-{process.pid}").read_text()

    def _wait(self, alive: list[subprocess.Popen[bytes]], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and all(process.poll() is None for process in alive):
            time.sleep(0.002)

    def _kill(self, victim: subprocess.Popen[bytes], home: Path) -> None:
        if victim.poll() is not None:
            return
        stage = "waiting" if self._log_of(victim).rstrip().endswith("waiting for it") else stage_of(home)
        victim.send_signal(signal.SIGKILL)
        if victim.wait() == -signal.SIGKILL:
            self.kills += 1
            self.stages[stage] += 1
            self._killed.add(victim.pid)

    def _look(self, home: Path) -> None:
        """Whatever has a name is as it will be in the end, although another process may be writing beside it."""
        for name, data in kept(home).items():
            self.published += 1
            if self._right.get(name) != data:
                self.faults.append(f"{home.name}: {name} was published with other bytes")

    def _compare(self, home: Path) -> None:
        found = kept(home)
        different = sorted(name for name in found.keys() | self._right if found.get(name) != self._right.get(name))
        if different:
            self.faults.append(f"{home.name}: not what an undisturbed prepare makes: {different}")
        if left := litter(home):
            self.faults.append(f"{home.name}: litter: {left}")

    def _bury(self) -> None:
        """The workers of the killed end by themselves, soon."""
        until = time.monotonic() + ORPHAN_SECONDS
        while (left := orphans(self._killed)) and time.monotonic() < until:
            time.sleep(0.02)
        self.faults += [f"{ORPHAN_SECONDS:.0f} s after it was orphaned there still runs: {what}" for what in left]
        self._killed.clear()


def orphans(sessions: set[int]) -> list[str]:
    """The command lines of what still runs in `sessions`."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


def kept(home: Path) -> dict[str, bytes]:
    """Every published byte under `home` that does not depend on the clock."""
    found = {name: data for room in ("raw", "tokens") for name, data in tree(home / room, room).items()}
    return {name: data for name, data in found.items() if not any(part.startswith(".") for part in Path(name).parts)}


def stage_of(home: Path) -> str:
    """How far the work under `home` has come, from what lies there."""
    receipts = {path.name.partition("-")[0] for path in home.glob("receipts/*.json")}
    folder = next(iter(home.glob("tokens/*")), home / "none")
    signs = {
        "ended": "verify" in receipts,
        "verify": "tokenize" in receipts,
        "download": any(home.glob("raw/**/.*.part")),
        "publish": (folder / "manifest.json").exists(),
        "tokenize": (folder / ".parts").exists(),
        "vocabulary": "fetch" in receipts,
        "fetch": (home / "locks").exists(),
    }
    return next((stage for stage, seen in signs.items() if seen), "start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills [default: 200]")
    parser.add_argument("--hub", action="store_true", help="from a slow Hub on loopback instead of local files")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, LocalHub() as hub:
        scratch = Path(name)
        environment = {**os.environ, "HF_ENDPOINT": hub.url}
        toml = hub_recipe(scratch, hub) if options.hub else local_recipe(scratch)
        storm = Storm(toml, scratch, options.seed, environment)
        before = hub.sent()
        storm.rage(options.count, lambda text: print(text, flush=True))
        print(f"{storm.kills} kills in {len(storm.stages)} stages, {storm.prepares} prepares ended, ", end="")
        print(f"{storm.published:,} published files looked at, {time.perf_counter() - began:.0f} s")
        if options.hub:
            print(f"{(hub.sent() - before) / before / storm.prepares:.2f} times the bytes of an undisturbed download")
        for fault in storm.faults:
            print(f"FAULT (seed {options.seed}): {fault}")
    return 1 if storm.faults else 0


if __name__ == "__main__":
    sys.exit(main())
