"""The command as a person meets it: what it prints, what it refuses, and how it ends."""

import json
import os
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from harness import millpond, states

from pipeline.cli.main import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def home(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one finished run, `tiny`."""
    path = tmp_path_factory.mktemp("home")
    done = run("train", tiny_toml, "--home", path)
    assert done.exit_code == 0, done.stderr
    return path


def refused(result: Result, code: int) -> list[str]:
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_every_verb_has_help_that_fits_80_columns() -> None:
    assert set(main.commands) >= {"prepare", "tokenize", "verify", "train", "evaluate", "sample", "status", "doctor"}
    for name, verb in main.commands.items():
        assert verb.help, name
        assert all(param.help for param in verb.params if isinstance(param, click.Option)), name
        shown = run(name, "--help").stdout
        assert max(map(len, shown.splitlines())) <= 80, name


def test_a_run_from_text_to_samples(home: Path, tiny_toml: Path) -> None:
    run_folder = home / "runs" / "tiny"
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    logs = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in logs] == list(range(1, 61))
    assert [row["step"] for row in evaluations] == [0, 20, 40, 60, 60]
    assert [row["val_tokens"] for row in evaluations] == [*[2048] * 4, 4096]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 1
    assert {
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tok_per_s",
        "data_wait_ms",
        "transfer_wait_ms",
        "step_ms",
        "stall_percent",
    } <= set(logs[0])
    assert (run_folder / "samples.jsonl").read_text().count("\n") == 2
    found = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    assert found == ["best.json", "step-000050", "step-000060"]
    receipt = json.loads((run_folder / "receipt.json").read_text())
    assert receipt["result"]["val_loss"] == evaluations[-1]["val_loss"]
    assert receipt["versions"]["torch"]


def test_again_it_is_done(home: Path, tiny_toml: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and "locks" not in path.parts}
    again = run("train", tiny_toml, "--home", home)
    assert again.exit_code == 0
    for stage in ("fetch", "tokenize", "verify", "train"):
        assert any(line.startswith(stage) and line.endswith(", already done") for line in again.stderr.splitlines()), (
            stage
        )
    after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and "locks" not in path.parts}
    assert after == before


def test_another_recipe_under_the_same_name(home: Path, tiny_toml: Path) -> None:
    asked = ("train", tiny_toml, "--home", home, "--set", "optim.lr=0.01", "--set", "model.n_layer=3")
    changed = run(*asked)
    assert refused(changed, 1)
    facts = (
        "run tiny",
        "  model.n_layer: 2 -> 3\n",
        "  optim.lr: 0.025 -> 0.01\n",
        "millpond resume tiny",
        "--name",
        "--fresh",
    )
    states(changed.stderr, *facts)


def test_what_cannot_change_the_result_may_change(home: Path, tiny_toml: Path) -> None:
    assert run("train", tiny_toml, "--home", home, "--set", "train.log_every=7").exit_code == 0


def test_fresh_sets_the_run_before_aside(home: Path, tiny_toml: Path) -> None:
    options = ("--home", home, "--name", "again", "--set", "train.steps=2")
    assert run("train", tiny_toml, *options).exit_code == 0
    fresh = run("train", tiny_toml, *options, "--fresh", "--set", "optim.lr=0.01")
    assert fresh.exit_code == 0
    assert "the run before is kept as again.1" in fresh.stderr
    assert (home / "runs" / "again.1" / "receipt.json").exists()


def test_evaluate(home: Path) -> None:
    found = json.loads(run("evaluate", "tiny", "--tokens", 4096, "--json", "--home", home).stdout)
    receipt = json.loads((home / "runs" / "tiny" / "receipt.json").read_text())
    assert found["val_loss"] == receipt["result"]["val_loss"]
    assert found["step"] == 60
    words = run("evaluate", "tiny", "--home", home)
    assert "nats/token" in words.stdout and "context 32" in words.stdout


@pytest.mark.slow
def test_document_masks_are_one_line_of_the_recipe(home: Path, tiny_toml: Path) -> None:
    options = ("--home", home, "--name", "masked", "--set", "train.document_mask=true", "--set", "train.steps=10")
    done = run("train", tiny_toml, *options)
    assert done.exit_code == 0, done.stderr
    plain = run("train", tiny_toml, "--home", home, "--name", "plain", "--set", "train.steps=10")
    assert plain.exit_code == 0, plain.stderr
    ends = [json.loads((home / "runs" / name / "receipt.json").read_text())["result"] for name in ("masked", "plain")]
    assert ends[0]["weights_sha256"] != ends[1]["weights_sha256"]
    found = json.loads(run("evaluate", "masked", "--tokens", 4096, "--json", "--home", home).stdout)
    assert found["val_loss"] == ends[0]["val_loss"]
    unmasked = run("train", tiny_toml, *options[:4], "--set", "train.steps=10")
    assert "  train.document_mask: True -> False" in refused(unmasked, 1)


def test_sample(home: Path) -> None:
    first = run("sample", "tiny", "--prompt", "Return the", "--tokens", 20, "--home", home)
    assert first.exit_code == 0
    assert first.stdout.startswith("Return the")
    assert run("sample", "tiny", "--prompt", "Return the", "--tokens", 20, "--home", home).stdout == first.stdout


def test_status(home: Path, tmp_path: Path) -> None:
    found = json.loads(run("status", "--json", "--home", home).stdout)
    assert [folder["state"] for folder in found["tokens"]] == ["complete"]
    tiny = next(row for row in found["runs"] if row["run"] == "tiny")
    assert (tiny["state"], tiny["step"], tiny["checkpoint"]) == ("done", 60, "step-000060")
    assert (tiny["tokenizer"], tiny["vocab_size"], tiny["tokens_here"]) == ("bpe-512", 512, True)
    assert tiny["token_folders"] == [folder["folder"] for folder in found["tokens"]]
    assert "run     tiny" in run("status", "--home", home).stdout
    nothing = run("status", "--home", tmp_path / "none").stdout
    assert nothing.startswith(f"nothing under {tmp_path}/none yet\n") and "--home DIR or MILLPOND_HOME" in nothing
    assert not (tmp_path / "none").exists()


def test_doctor(tmp_path: Path) -> None:
    found = json.loads(run("doctor", "--json", "--home", tmp_path).stdout)
    assert found["fit"] is True
    assert {check["name"] for check in found["checks"]} >= {"python", "packages", "memory", "home", "disk", "gpu"}
    assert "python" in run("doctor", "--home", tmp_path).stdout


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A place where nobody, root included, can make a folder."""
    if os.geteuid() == 0:
        return Path("/sys/millpond")
    tmp_path.chmod(0o555)
    return tmp_path / "home"


def test_a_read_only_home(unwritable: Path, tiny_toml: Path) -> None:
    lines = refused(run("train", tiny_toml, "--home", unwritable), 3)
    assert lines[0].startswith(f"error: {unwritable}: cannot be made: ")
    assert lines[1:] == [
        "nothing was changed",
        "hint: make the folder writable, or choose another place with --home DIR",
    ]


def test_a_missing_corpus_file(tmp_path: Path) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{tmp_path}/none.parquet"]\n')
    lines = refused(run("prepare", toml, "--home", tmp_path / "home"), 2)
    assert lines == [
        f"error: corpus.files: no file matches '{tmp_path}/none.parquet'",
        "hint: check the path",
    ]


def test_a_parquet_without_the_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    toml = tmp_path / "mine.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{tmp_path}/a.parquet"]\n')
    lines = refused(run("prepare", toml, "--home", tmp_path / "home"), 2)
    assert lines[-3:] == [
        f"error: {tmp_path}/a.parquet: no column 'text', it has content",
        "the documents are read from one field of text",
        "hint: name it with --set corpus.text_column=NAME",
    ]


def test_a_flipped_byte_is_found_before_the_first_step(tiny_toml: Path, tmp_path: Path) -> None:
    assert run("prepare", tiny_toml, "--home", tmp_path).exit_code == 0
    (folder,) = (tmp_path / "tokens").iterdir()
    path = folder / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[2000] ^= 4
    path.write_bytes(data)
    lines = refused(run("train", tiny_toml, "--home", tmp_path), 4)
    assert "error: " + str(path) in lines[-3]
    assert lines[-2] == "at least one token differs from what was written: the disk or a copy damaged it"
    lines = refused(run("verify", tiny_toml, "--home", tmp_path), 4)
    assert lines[-4].startswith(f"error: {folder}: ")
    assert lines[-3].startswith("  train-00002.bin: sha256 is ")
    assert "millpond tokenize CONFIG --force" in lines[-1]
    assert run("tokenize", tiny_toml, "--force", "--home", tmp_path).exit_code == 0
    assert run("verify", tiny_toml, "--home", tmp_path).exit_code == 0


def test_a_run_that_is_not_there(home: Path) -> None:
    lines = refused(run("sample", "tyni", "--home", home), 2)
    assert lines[0] == f"error: no run 'tyni' under {home}/runs"


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "x" * 61, "späti"])
def test_a_name_that_is_no_folder_name(name: str, home: Path, tiny_toml: Path) -> None:
    assert run("train", tiny_toml, "--name", name, "--home", home).exit_code == 2
    assert run("sample", name, "--home", home).exit_code == 2
    assert not (home / "up").exists()


def test_two_processes_do_not_train_one_run(home: Path, tiny_toml: Path) -> None:
    from filelock import FileLock

    with FileLock(home / "locks" / "run-tiny.lock"):
        found = millpond("train", tiny_toml, "--home", home)
    assert found.returncode == 1
    assert "error: run tiny: another process is working on it" in found.stderr


def test_usage_errors_exit_with_2() -> None:
    assert run("trian").exit_code == 2
    assert run("train", "--steps", "5").exit_code == 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.batch_tokens=100", "train.batch_tokens is 100, not a multiple of model.seq_len, 32"),
        ("train.micro_batch=3", "train.micro_batch is 3, a step has 8 sequences"),
        ("model.n_head=5", "model.d_model is 32, model.n_head 5"),
        ("train.tokens=1000", "train.tokens is 1000 and train.steps is 60"),
        ("tokens.vocab_size=100", 'tokens.vocab_size is 100, a "bpe" tokenizer has at least 258'),
    ],
)
def test_settings_that_cannot_be(setting: str, says: str, tiny_toml: Path, tmp_path: Path) -> None:
    lines = refused(run("train", tiny_toml, "--home", tmp_path, "--set", setting), 2)
    assert f"error: {says}" in lines
    assert lines[-1].startswith("hint: ")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "tokens").exists()


def test_a_recipe_that_the_text_is_too_small_for_leaves_no_run_behind(tiny_toml: Path, home: Path) -> None:
    options = ("--name", "long", "--home", home, "--set", "model.seq_len=100000", "--set", "train.batch_tokens=100000")
    lines = refused(run("train", tiny_toml, *options), 1)
    assert lines[-3].endswith("tokens, one window takes 100,001")
    assert not (home / "runs" / "long").exists()
