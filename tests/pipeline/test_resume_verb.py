"""`millpond resume`: a run goes on by its name alone, also when it is finished, its text is gone, or it was killed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness import TINY, command, litter, results, run, tree

from pipeline import config
from pipeline.cli.main import main
from pipeline.home.layout import Layout, RunPaths
from train import loop
from train.session import Output, Session
from train.telemetry.metrics import read_rows

SETTINGS = ("--set", "optim.lr=0.02", "--set", "model.d_model=16", "--set", "train.steps=16")


@pytest.fixture(scope="module")
def toml(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY.format(files=corpus_file).replace("checkpoint_every = 10", "checkpoint_every = 5"))
    return path


@pytest.fixture(scope="module")
def finished(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a finished run of 16 steps that was begun with settings of its own."""
    home = tmp_path_factory.mktemp("finished")
    run("train", toml, *SETTINGS, "--home", home)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "home"))


@pytest.fixture(scope="module")
def longer(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, made 30 steps long."""
    home = Path(shutil.copytree(finished, tmp_path_factory.mktemp("longer") / "home"))
    run("resume", "tiny", "--steps", 30, "--home", home)
    return home


def run_of(home: Path, name: str = "tiny") -> RunPaths:
    return Layout(home).run(name)


def receipt_of(home: Path, name: str = "receipt.json") -> dict[str, Any]:
    return dict(json.loads((run_of(home).root / name).read_text())["result"])


class Stopped(BaseException):
    pass


def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """The run dies when it comes to save at this step."""
    save = loop._save

    def stop(run: Session, out: Output) -> None:
        if run.state.step >= step:
            raise Stopped
        save(run, out)

    patch.setattr(loop, "_save", stop)


def die(step: int, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(step, patch)
        CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_no_setting_is_said_again(toml: Path, finished: Path, tmp_path: Path) -> None:
    die(12, "train", toml, *SETTINGS, "--home", tmp_path)
    said = run("resume", "tiny", "--home", tmp_path)
    assert "resumes at step 10 of 16" in said.stderr
    assert receipt_of(tmp_path)["weights_sha256"] == receipt_of(finished)["weights_sha256"]
    assert results(run_of(tmp_path).metrics) == results(run_of(finished).metrics)
    assert "already done" in run("train", toml, *SETTINGS, "--home", tmp_path).stderr
    assert not litter(tmp_path)


def test_a_finished_run_says_so(home: Path) -> None:
    before = tree(run_of(home).root)
    assert "train     tiny  16 steps, validation " in run("resume", "tiny", "--home", home).stderr
    assert "already done" in run("resume", run_of(home).root, "--steps", 16).stderr
    assert "already done" in run("resume", "--tokens", 16 * 256 + 255, "--home", home).stderr
    assert tree(run_of(home).root) == before


def test_the_texts_are_not_needed(corpus_file: Path, toml: Path, tmp_path: Path) -> None:
    texts, recipe = tmp_path / "texts.jsonl", tmp_path / "tiny.toml"
    shutil.copy(corpus_file, texts)
    recipe.write_text(toml.read_text().replace(str(corpus_file), str(texts)))
    die(12, "train", recipe, *SETTINGS, "--home", tmp_path / "home")
    texts.unlink()
    said = run("train", recipe, *SETTINGS, "--home", tmp_path / "home", code=2).stderr
    assert "millpond resume tiny, or --set tokens.folder=tiny-" in said
    run("resume", "tiny", "--home", tmp_path / "home")
    assert receipt_of(tmp_path / "home")["steps"] == 16


def test_without_its_tokens(home: Path) -> None:
    shutil.rmtree(home / "tokens")
    said = run("resume", "tiny", "--steps", 20, "--home", home, code=1).stderr
    assert "error: resume needs the tokens tiny-" in said and f"which are not in this home, {home}\n" in said
    assert config.load_run(run_of(home).recipe).train.steps == 16
    assert run_of(home).receipt.exists()


def test_another_token_folder_of_the_same_name(home: Path, toml: Path, tmp_path: Path) -> None:
    run("prepare", toml, "--set", "tokens.val_fraction=0.2", "--home", tmp_path / "other")
    (ours,), (theirs,) = ((each / "tokens").iterdir() for each in (home, tmp_path / "other"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    said = run("resume", "tiny", "--steps", 20, "--home", home, code=1).stderr
    assert f"{ours}: its fingerprint is" in said


def test_what_cannot_change_the_result_may_be_set(home: Path) -> None:
    run("resume", "tiny", "--steps", 20, "--device", "cpu", "--set", "train.log_every=3", "--home", home)
    logged = [row["step"] for row in read_rows(run_of(home).metrics) if "loss" in row]
    assert logged == [*range(1, 17), 18, 20]
    kept = config.load_run(run_of(home).recipe)
    assert (kept.train.device, kept.train.log_every, kept.train.steps) == ("auto", 1, 20)


@pytest.mark.parametrize("setting", ["optim.lr=0.5", "model.n_layer=3", "train.seed=1", "train.steps=40"])
def test_what_can_is_refused(home: Path, setting: str) -> None:
    before = tree(run_of(home).root)
    said = run("resume", "tiny", "--set", setting, "--home", home, code=1).stderr
    assert f"  {setting.split('=')[0]}: " in said and "millpond resume tiny" in said
    assert tree(run_of(home).root) == before


@pytest.mark.parametrize("setting", ["tokens.val_fraction=0.3", "corpus.files=other.txt", "tokens.workers=7"])
def test_what_would_be_ignored_is_refused(home: Path, setting: str) -> None:
    said = run("resume", "tiny", "--set", setting, "--home", home, code=2).stderr
    assert f"error: these settings would have no effect:\n  {setting.split('=')[0]}: " in said


def test_training_with_the_recipe_of_the_run(home: Path) -> None:
    """It is the run itself that is meant, with and without its name."""
    for options in ((), ("--name", "tiny")):
        assert "already done" in run("train", run_of(home).recipe, *options, "--home", home).stderr
    assert [path.name for path in (home / "runs").iterdir()] == ["tiny"]


def test_options_that_cannot_be(home: Path) -> None:
    for options in (("--steps", 20, "--tokens", 9999), ("--steps", 0), ("--tokens", -1), ("--max-hours", "nan")):
        run("resume", "tiny", *options, "--home", home, code=2)
    assert "did you mean tiny?" in run("resume", "tyni", "--home", home, code=2).stderr
    assert "no run under" in run("resume", "--home", home / "none", code=2).stderr


@pytest.mark.parametrize("options", [("--steps", 8), ("--steps", 15), ("--tokens", 16 * 256 - 1), ("--tokens", 1)])
def test_a_run_does_not_become_shorter(home: Path, options: tuple[str, int]) -> None:
    before = tree(run_of(home).root)
    said = run("resume", "tiny", *options, "--home", home, code=2).stderr
    assert "tiny is planned for 16 steps (4,096 tokens)" in said and "longer, not shorter" in said
    assert tree(run_of(home).root) == before


def test_a_finished_run_is_made_longer(finished: Path, longer: Path) -> None:
    """It is what its recipe says: the same recipe, trained from the beginning, ends in the same bits."""
    train = config.load_run(run_of(longer).recipe).train
    assert train.steps == 30 and [(each.steps, each.until) for each in train.earlier] == [(16, 16)]
    assert receipt_of(longer, "receipt-000016.json") == receipt_of(finished)
    end = receipt_of(longer)
    assert (end["steps"], end["tokens"]) == (30, 30 * 256)
    run("train", run_of(longer).recipe, "--name", "scratch", "--home", longer)
    scratch = run_of(longer, "scratch")
    assert json.loads(scratch.receipt.read_text())["result"] == end
    assert results(scratch.metrics) == results(run_of(longer).metrics)
    assert results(scratch.samples) == results(run_of(longer).samples)
    assert "already done" in run("train", run_of(longer).recipe, "--name", "tiny", "--home", longer).stderr
    assert not litter(longer)


def test_its_rows_go_on(finished: Path, longer: Path) -> None:
    before, after = (results(run_of(home).metrics) for home in (finished, longer))
    assert after[: len(before)] == before
    assert [row["step"] for row in after if "loss" in row] == list(range(1, 31))
    assert [row["step"] for row in after if "val_loss" in row] == [0, 16, 16, 20, 30, 30]


def test_the_recipe_of_before_names_the_run_as_it_is(longer: Path, toml: Path) -> None:
    said = run("train", toml, *SETTINGS, "--home", longer, code=1).stderr
    assert "recipe:\n  train.steps: 30 -> 16\nresuming" in said and "makes it longer" not in said
    said = run("train", toml, *SETTINGS, "--set", "train.steps=50", "--home", longer, code=1).stderr
    assert "hint: millpond resume tiny --steps 50 makes it longer; " in said


@pytest.mark.parametrize("moment", [17, 22, 26, 30])
def test_killed_while_it_is_longer(home: Path, longer: Path, moment: int) -> None:
    """Whether the same command is run again, or resume alone."""
    die(moment, "resume", "tiny", "--steps", 30, "--home", home)
    assert not run_of(home).receipt.exists()
    assert run("evaluate", "tiny", "--tokens", 64, "--home", home).exit_code == 0
    run("sample", "tiny", "--tokens", 2, "--home", home)
    again = ("--steps", 30) if moment % 4 else ()
    run("resume", "tiny", *again, "--home", home)
    assert receipt_of(home) == receipt_of(longer)
    assert results(run_of(home).metrics) == results(run_of(longer).metrics)
    assert run_of(home).recipe.read_bytes() == run_of(longer).recipe.read_bytes()


@pytest.mark.parametrize("published", [0, 1])
def test_killed_while_the_extension_is_recorded(
    home: Path, longer: Path, published: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the receipt's new name and the recipe, and right behind it."""
    save = config.save

    def stop(*arguments: Any) -> None:
        if published:
            save(*arguments)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(config, "save", stop)
        CliRunner().invoke(main, ["resume", "tiny", "--steps", "30", "--home", str(home)], catch_exceptions=False)
    assert "run     tiny" in run("status", "--home", home).stdout
    run("resume", "tiny", "--steps", 30, "--home", home)
    assert receipt_of(home) == receipt_of(longer)
    assert receipt_of(home, "receipt-000016.json")["steps"] == 16


@pytest.mark.slow
def test_sigkill_at_any_moment(home: Path, longer: Path) -> None:
    """Three real kills, then to the end."""
    for rows in (1, 4, 8):
        process = subprocess.Popen(command("resume", "tiny", "--steps", 30, "--home", home), stderr=subprocess.DEVNULL)
        while process.poll() is None and last_step(home) < 16 + rows:
            time.sleep(0.001)
        process.kill()
        process.wait()
    run("resume", "tiny", "--home", home)
    assert receipt_of(home) == receipt_of(longer)
    assert results(run_of(home).metrics) == results(run_of(longer).metrics)


def last_step(home: Path) -> int:
    return max(row["step"] for row in read_rows(run_of(home).metrics))


@pytest.mark.slow
def test_an_unfinished_run_is_made_longer(toml: Path, tmp_path: Path) -> None:
    die(12, "train", toml, *SETTINGS, "--home", tmp_path)
    said = run("resume", "tiny", "--tokens", 24 * 256, "--home", tmp_path).stderr
    assert "tiny: 16 steps become 24\n" in said and "resumes at step 10 of 24" in said
    train = config.load_run(run_of(tmp_path).recipe).train
    assert (train.tokens, train.steps) == (24 * 256, 0)
    assert [(each.steps, each.until) for each in train.earlier] == [(16, 10)]
    run("train", run_of(tmp_path).recipe, "--name", "scratch", "--home", tmp_path)
    ends = [json.loads(run_of(tmp_path, name).receipt.read_text())["result"] for name in ("tiny", "scratch")]
    assert ends[0] == ends[1] and ends[0]["steps"] == 24
    assert not list(run_of(tmp_path).root.glob("receipt-*"))


@pytest.mark.slow
def test_before_its_first_checkpoint_a_run_has_no_earlier_length(toml: Path, tmp_path: Path) -> None:
    die(3, "train", toml, *SETTINGS, "--home", tmp_path)
    run("resume", "tiny", "--steps", 20, "--home", tmp_path)
    assert config.load_run(run_of(tmp_path).recipe).train.earlier == ()
    run("train", toml, *SETTINGS, "--set", "train.steps=20", "--name", "scratch", "--home", tmp_path)
    ends = [json.loads(run_of(tmp_path, name).receipt.read_text())["result"] for name in ("tiny", "scratch")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_made_longer_again_and_again(home: Path) -> None:
    for steps in (18, 23, 30):
        run("resume", "tiny", "--steps", steps, "--home", home)
    train = config.load_run(run_of(home).recipe).train
    assert [(each.steps, each.until) for each in train.earlier] == [(16, 16), (18, 18), (23, 23)]
    assert sorted(path.name for path in run_of(home).root.glob("receipt*")) == [
        "receipt-000016.json",
        "receipt-000018.json",
        "receipt-000023.json",
        "receipt.json",
    ]
    run("train", run_of(home).recipe, "--name", "scratch", "--home", home)
    ends = [json.loads(run_of(home, name).receipt.read_text())["result"] for name in ("tiny", "scratch")]
    assert ends[0] == ends[1]


def test_a_finished_run_whose_weights_are_gone(home: Path) -> None:
    shutil.rmtree(run_of(home).checkpoints)
    said = run("resume", "tiny", "--steps", 20, "--home", home, code=1).stderr
    assert "its weights are gone" in said and "--fresh" in said
    assert run_of(home).receipt.exists() and config.load_run(run_of(home).recipe).train.steps == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "says", "more"),
    [
        ("linear", "is recomputed over all 64 steps:", ("--set", "optim.decay_fraction=0.5")),
        ("cosine", "is recomputed over all 64 steps:", ()),
        ("constant", "continues:", ()),
    ],
)
def test_what_the_learning_rate_does_is_said(
    toml: Path, home: Path, schedule: str, says: str, more: tuple[str, ...]
) -> None:
    settings = ("--set", f"optim.schedule={schedule}", "--set", "optim.warmup_steps=4", "--set", "train.steps=12")
    run("train", toml, "--name", schedule, *settings, *more, "--home", home)
    lines = run("resume", schedule, "--steps", 64, "--max-hours", 1e-9, "--home", home, code=75).stderr.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("its learning rate"))
    assert max(len(line) for line in lines[at - 1 : at + 2]) <= 80
    assert lines[at - 1].strip() == f"{schedule}: 12 steps become 64"
    assert lines[at].strip() == f"its learning rate, {schedule}, {says}"
    said = [float(part.split(" at step ")[0]) for part in lines[at + 1].split(",")]
    run("resume", schedule, "--home", home)
    rates = {row["step"]: row["lr"] for row in read_rows(run_of(home, schedule).metrics) if "lr" in row}
    assert said == [float(f"{rates[step]:.2e}") for step in (12, 13, 64)]


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ((), ""),
        (("RUN=",), ""),
        (("RUN=first", "STEPS=90"), "first --steps 90"),
        (("CONFIG=gpt2", "TOKENS=9"), "gpt2 --tokens 9"),
        (("RUN=a", "MAXHOURS=2"), "a --max-hours 2"),
    ],
)
def test_make_forwards_it(variables: tuple[str, ...], arguments: str) -> None:
    root = Path(__file__).parents[2]
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("RUN", "CONFIG", "MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        ["make", "-n", "resume", *variables], cwd=root, env=clean, capture_output=True, text=True, check=True
    )
    assert shlex.split(done.stdout.splitlines()[-1]) == [".venv/bin/millpond", "resume", *arguments.split()]


def test_max_hours(home: Path) -> None:
    said = run("resume", "tiny", "--steps", 30, "--max-hours", 1e-9, "--home", home, code=75).stderr
    assert "time is up: saved at step 17 of 30" in said
    run("resume", "tiny", "--home", home)
    assert receipt_of(home)["steps"] == 30


@pytest.mark.slow
def test_two_processes(home: Path, longer: Path) -> None:
    """torchrun: both ranks resume, and the second one learns from the first how long the run has become."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for arguments in (("--steps", "30", "--max-hours", "1e-9"), ()):
        done = subprocess.run(
            [*launch, "pipeline.cli.main", "resume", *arguments, "--device", "cpu", "--home", str(home)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
            check=False,
        )
        log = done.stdout + done.stderr
        assert log.count("tiny is the newest run") == 1, log
        assert (done.returncode == 0) == (not arguments), log
    assert receipt_of(home)["steps"] == 30
    ours, theirs = (
        [row["loss"] for row in read_rows(run_of(each).metrics) if "loss" in row] for each in (home, longer)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_resume(home: Path) -> None:
    process = subprocess.Popen(
        command("resume", "tiny", "--steps", 5000, "--home", home), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and last_step(home) < 18:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 143, log
    assert "saved at step " in log and " of 5000" in log
