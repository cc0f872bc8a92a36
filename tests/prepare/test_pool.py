"""Worker processes: what ends one is said as it is, and where there can be none, this process works alone."""

import multiprocessing.heap
import multiprocessing.synchronize
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from harness import command, prepared, tree

from pipeline.config import load
from prepare import pool

MANY = ("--set", "tokens.part_tokens=2000", "--set", "tokens.workers=2")


@pytest.mark.parametrize(
    ("code", "for_memory", "says"),
    [
        (-9, True, "memory ran out: the kernel killed a worker process"),
        (-9, False, "a worker process was ended by SIGKILL"),
        (-11, True, "a worker process was ended by SIGSEGV"),
        (1, False, "a worker process ended with exit code 1"),
    ],
)
def test_why_a_worker_died(code: int, for_memory: bool, says: str) -> None:
    error = pool._death_of(code, for_memory)
    assert (error.what, error.exit_code) == (says, 3)


def test_a_killed_worker_is_called_killed(tiny_toml: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("prepare", tiny_toml, *MANY, "--home", tmp_path), stderr=subprocess.PIPE, text=True
    )
    victim = None
    while process.poll() is None and victim is None:
        workers = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
        victim = next(iter(workers), None)
        time.sleep(0.002)
    assert victim is not None
    victim.kill()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 3, log
    assert "a worker process was ended by SIGKILL" in log
    assert "Traceback" not in log and "memory" not in log


@pytest.mark.slow
def test_a_worker_that_cannot_start_shows_its_own_error(tiny_toml: Path, tmp_path: Path) -> None:
    """Its tokenizer's file vanishes between the start of the command and that of the workers."""
    code = (
        "import sys; from prepare import pool; real = pool._Worker\n"
        "def worker(job, *rest):\n"
        "    [path.unlink(missing_ok=True) for path in job.folder.glob('tokenizer.*')]\n"
        "    return real(job, *rest)\n"
        "pool._Worker = worker\n"
        "if __name__ == '__main__': from pipeline.cli.main import main; main(sys.argv[1:])"
    )
    arguments = [str(each) for each in ("prepare", tiny_toml, *MANY, "--home", tmp_path)]
    done = subprocess.run([command()[0], "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 1), done.stderr
    assert "tokenizer.tiktoken" in done.stderr and "No such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_shared_memory_nothing_changes(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without /dev/shm has no semaphores, and none is asked for."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "/dev/shm/x")

    monkeypatch.setattr(multiprocessing.synchronize, "SemLock", refused)
    monkeypatch.setattr(multiprocessing.heap, "Arena", refused)
    recipe = load(str(tiny_toml), ("tokens.part_tokens=2000", "tokens.workers=2"))[1]
    one = msgspec.structs.replace(recipe, tokens=msgspec.structs.replace(recipe.tokens, workers=1))
    assert tree(prepared(recipe, tmp_path / "two")) == tree(prepared(one, tmp_path / "one"))


@pytest.mark.slow
def test_modules_of_the_working_folder_are_not_imported(tiny_toml: Path, tmp_path: Path) -> None:
    names = ("signal", "types", "struct", "socket", "queue", "json", "numpy", "train", "shards", "prepare")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the working folder was run')")
    entry = "import sys; from pipeline.cli.main import main; main(sys.argv[1:])"  # with -P as a console script
    done = subprocess.run(
        [
            command()[0],
            "-P",
            "-c",
            entry.replace("sys.path.pop(0); ", ""),
            "prepare",
            tiny_toml,
            *MANY,
            "--home",
            "home",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(pool.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pipeline.cli import main as cli; from pipeline.stages import Pipeline\n"
        "def stuck(self):\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    finally: print('waiting', flush=True); time.sleep(60)\n"
        "Pipeline.prepare = stuck; cli.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [command()[0], "-c", code, "prepare", "demo", "--home", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for said in ("ready", "waiting"):
        assert process.stdout.readline().strip() == said
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    process.stdout.close()
