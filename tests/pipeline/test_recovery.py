"""Found by trying to break it: nothing published is lost, nothing damaged passes, every dead end has a way out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from harness import command, files_no_longer_than

from pipeline.cli.main import main
from prepare import build
from shards import Manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def last_lines(result: Result, code: int, count: int = 3) -> str:
    assert result.exit_code == code, (result.stderr, result.exception)
    return "\n".join(result.stderr.splitlines()[-count:])


@pytest.fixture
def home(tiny_toml: Path, tmp_path: Path) -> Path:
    assert run("prepare", tiny_toml, "--home", tmp_path / "home").exit_code == 0
    return tmp_path / "home"


def folder_of(home: Path) -> Path:
    return next((home / "tokens").iterdir())


def test_published_parts_are_never_taken_away(tiny_toml: Path, home: Path) -> None:
    folder = folder_of(home)
    parts = Manifest.read(folder).parts
    (folder / ".parts").mkdir()  # as after a kill between the manifest and the end
    assert run("prepare", tiny_toml, "--home", home, "--set", "tokens.max_tokens=1000").exit_code == 0
    assert Manifest.read(folder).parts == parts
    assert Manifest.read(folder).complete
    assert not (folder / ".parts").exists()


@pytest.mark.slow
def test_a_gap_is_filled_before_anything_is_published(tiny_toml: Path, tmp_path: Path) -> None:
    """Parts 1 and 2 sealed, part 0 not, and few tokens asked for: part 0 must still be built."""
    home = tmp_path / "home"
    folder = folder_of_killed(tiny_toml, home)
    (folder / ".parts" / "00000.json").unlink()
    asked = ("--set", "tokens.max_tokens=1000", "--set", "tokens.workers=2")
    assert run("prepare", tiny_toml, "--home", home, *asked).exit_code == 0
    manifest = Manifest.read(folder)
    assert len(manifest.parts) == 1
    assert sorted(path.name for path in folder.glob("train-*")) == ["train-00000.bin", "train-00000.docs.npy"]


def folder_of_killed(toml: Path, home: Path) -> Path:
    """A folder as a kill leaves it that comes just before the manifest is written."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    patch = pytest.MonkeyPatch()
    patch.setattr(build, "_publish", die)
    with pytest.raises(Killed):
        CliRunner().invoke(main, ["prepare", str(toml), "--home", str(home)], catch_exceptions=False)
    patch.undo()
    return folder_of(home)


def test_damage_is_not_forgotten(tiny_toml: Path, home: Path) -> None:
    path = folder_of(home) / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert run("prepare", tiny_toml, "--home", home).exit_code == 0  # it was verified, and its size is right
    assert run("verify", tiny_toml, "--quick", "--home", home).exit_code == 0
    assert run("verify", tiny_toml, "--home", home).exit_code == 4
    assert run("prepare", tiny_toml, "--home", home).exit_code == 4
    path.unlink()
    assert run("prepare", tiny_toml, "--home", home).exit_code == 4


def test_text_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "before"}\n' * 50)
    toml = tmp_path / "a.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{source}"]\n[tokens]\nworkers = 1\n')
    seal = build.Builder.build

    def change(builder: build.Builder, part: object) -> object:
        record = seal(builder, part)
        source.write_text('{"text": "after"}\n' * 50)
        return record

    monkeypatch.setattr(build.Builder, "build", change)
    found = last_lines(run("prepare", toml, "--home", tmp_path / "home"), 4)
    assert f"{source}: changed while it was read" in found
    assert not list((tmp_path / "home").rglob("manifest.json"))
    monkeypatch.undo()
    assert run("prepare", toml, "--home", tmp_path / "home").exit_code == 0


def test_a_manifest_that_lost_a_part(tiny_toml: Path, home: Path) -> None:
    path = folder_of(home) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"].pop(0)
    path.write_text(json.dumps(manifest))
    assert "part 0 names train-00001.bin as its train shard" in last_lines(run("prepare", tiny_toml, "--home", home), 4)


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    for i in range(150):
        (tmp_path / f"{i:03}.txt").write_text(f"document number {i}, of a part's length. " * 100)
    toml = tmp_path / "a.toml"
    toml.write_text(
        f'[corpus]\nkind = "files"\nfiles = ["{tmp_path}/*.txt"]\n'
        "[tokens]\nworkers = 1\nval_fraction = 0.5\npart_tokens = 1000\n"
    )
    line = f"ulimit -S -n 128; {sys.executable} -m pipeline.cli.main prepare {toml} --home {tmp_path}/home"
    for _ in range(2):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("home/tokens/*/*.bin"))) == 150


def test_links_to_files_without_a_suffix(tmp_path: Path) -> None:
    """How the Hub's cache keeps files."""
    blob = tmp_path / "3f9aabcdef"
    pq.write_table(pa.table({"text": pa.array(["a b c"] * 9).dictionary_encode()}), blob)
    (tmp_path / "000.parquet").symlink_to(blob)
    toml = tmp_path / "a.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{tmp_path}/*.parquet"]\n[tokens]\nworkers = 1\n')
    assert run("prepare", toml, "--home", tmp_path / "home").exit_code == 0
    (tmp_path / "001.parquet").symlink_to(tmp_path / "nowhere")
    assert "001.parquet: is a link that leads nowhere" in last_lines(run("prepare", toml, "--home", tmp_path / "h"), 2)


@pytest.fixture
def trained(tiny_toml: Path, home: Path) -> Path:
    assert run("train", tiny_toml, "--home", home, "--set", "train.steps=4").exit_code == 0
    return home


def test_a_run_without_its_recipe(tiny_toml: Path, trained: Path) -> None:
    root = trained / "runs" / "tiny"
    (root / "run.toml").rename(root / "kept")
    found = last_lines(run("train", tiny_toml, "--home", trained, "--set", "train.steps=4"), 1)
    assert "run.toml: is missing, and there are checkpoints" in found
    assert "--name tiny --fresh" in found
    text = (root / "kept").read_text()
    (root / "run.toml").write_text(text.replace("n_layer = 2", "n_layer = 3"))
    for verb in ("evaluate", "sample"):
        found = last_lines(run(verb, "tiny", "--home", trained), 1, 4)
        assert "another recipe than the run's:\n  model.n_layer: 2 -> 3\n" in found


def test_a_run_without_its_tokens(tiny_toml: Path, trained: Path) -> None:
    path = trained / "runs" / "tiny" / "tokens.json"
    for data in (b"garbage", None):
        path.write_bytes(data) if data else path.unlink()
        assert "--name tiny --fresh" in last_lines(
            run("train", tiny_toml, "--home", trained, "--set", "train.steps=4"), 4
        )


def test_a_fresh_start_that_fails_leaves_what_was(tiny_toml: Path, trained: Path) -> None:
    long = ("--set", "model.seq_len=200000", "--set", "train.batch_tokens=200000")
    found = last_lines(run("train", tiny_toml, "--home", trained, "--fresh", *long), 1)
    assert "or choose a smaller model.seq_len" in found
    assert run("evaluate", "tiny", "--home", trained).exit_code == 0
    assert [path.name for path in (trained / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize("line", [b"garbage\n", b"\n", b'{"step":NaN}\n', b'{"loss":1}\n', b"\xff\n"])
def test_a_damaged_line_of_metrics(tiny_toml: Path, trained: Path, line: bytes) -> None:
    path = trained / "runs" / "tiny" / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes())
    (trained / "runs" / "tiny" / "receipt.json").unlink()
    found = last_lines(run("train", tiny_toml, "--home", trained, "--set", "train.steps=4"), 4)
    assert f"{path}: line 1 is not a row with a step" in found
    assert run("status", "--home", trained).exit_code == 0


def test_reading_a_run_does_not_disturb_who_writes_it(trained: Path) -> None:
    at_work = trained / "runs" / "tiny" / "checkpoints" / ".step-000009.1-00000000.tmp"
    at_work.mkdir()
    assert run("evaluate", "tiny", "--home", trained).exit_code == 0
    assert run("sample", "tiny", "--tokens", "2", "--home", trained).exit_code == 0
    assert at_work.exists()


def test_an_answer_that_cannot_be_kept_is_given(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    with files_no_longer_than(10):
        found = run("evaluate", "tiny", "--home", trained)
    assert found.exit_code == 0 and "nats/token" in found.stdout
    assert "evaluation.json: cannot be published" in caplog.text
    assert not (trained / "runs" / "tiny" / "evaluation.json").exists()


def test_a_tokenizer_damaged_before_growth(tiny_toml: Path, tmp_path: Path) -> None:
    home = tmp_path / "grown"
    assert run("prepare", tiny_toml, "--home", home, "--set", "tokens.max_tokens=1000").exit_code == 0
    (folder_of(home) / "tokenizer.json").write_bytes(b"{")
    found = last_lines(run("prepare", tiny_toml, "--home", home, "--set", "tokens.workers=2"), 4)
    assert "tokenizer.json: sha256 is" in found


def test_more_white_space_than_tiktoken_can_split(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "a" + " " * 1_000_000 + "b"}) + "\n")
    toml = tmp_path / "a.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{source}"]\n[tokens]\nworkers = 1\n')
    assert run("prepare", toml, "--home", tmp_path / "home").exit_code == 0
    slow = run("prepare", toml, "--home", tmp_path / "slow", "--set", "tokens.engine=tiktoken")
    assert "--set tokens.engine=fastokens" in last_lines(slow, 1)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tokens.vocab_size=4096", 'tokens.vocab_size is 4096, and tokens.tokenizer is "gpt2"'),
        ("train.steps=[[[[", "expected a whole number"),
        ("corpus.name=..", "corpus.name"),
        ('corpus.name="x\\n"', "corpus.name"),
    ],
)
def test_settings_that_once_passed(corpus_file: Path, tmp_path: Path, setting: str, says: str) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{corpus_file}"]\n')
    assert says in last_lines(run("prepare", toml, "--home", tmp_path / "home", "--set", setting), 2)


def test_brackets_in_a_path_and_a_terminal_without_columns(tiny_toml: Path, tmp_path: Path) -> None:
    home = tmp_path / "[red]"
    assert run("train", tiny_toml, "--home", home, "--set", "train.steps=1").stdout.endswith(f"{home}/runs/tiny\n")
    environment = {**os.environ, "COLUMNS": "0"}
    arguments = command("prepare", tiny_toml, "--set", "foo.bar=1")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert "unknown key foo" in done.stderr


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    os.mkfifo(tmp_path / "b.toml")
    for name in ("a.toml", "b.toml"):
        assert f"{name}: is not a file" in last_lines(run("prepare", tmp_path / name), 2)
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[corpus]\nkind = 'files'\nfiles = ['none']\n")
    assert "no file matches 'none'" in last_lines(run("prepare", tmp_path / "c.toml", "--home", tmp_path / "h"), 2)


def test_numbers_that_cannot_be(trained: Path) -> None:
    for option in (("--temperature", "-1"), ("--tokens", "-5"), ("--seed", "9" * 30)):
        assert run("sample", "tiny", *option, "--home", trained).exit_code == 2, option
    assert run("sample", "tiny", "--temperature", "1e-320", "--tokens", 2, "--home", trained).exit_code == 0


def test_checkpoints_removed_from_a_finished_run(tiny_toml: Path, trained: Path) -> None:
    shutil.rmtree(trained / "runs" / "tiny" / "checkpoints")
    for verb in ("evaluate", "sample"):
        said = last_lines(run(verb, "tiny", "--home", trained), 1)
        assert "millpond resume tiny; if that says it is done, millpond train with --name tiny --fresh" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "workers", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGHUP, 2, 129), (signal.SIGINT, 2, 130)]
)
def test_a_signal_while_preparing(tiny_toml: Path, tmp_path: Path, signum: int, workers: int, code: int) -> None:
    options = ("--set", "tokens.part_tokens=2000", "--set", f"tokens.workers={workers}", "--home", tmp_path)
    in_background = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")  # as a script's jobs are: SIGINT is ignored at first
    process = subprocess.Popen(
        [*in_background, *command("prepare", tiny_toml, *options)], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(list(tmp_path.glob("tokens/*/.parts/*.json"))) < 3:
        time.sleep(0.002)
    process.send_signal(signum)
    _, log = process.communicate(timeout=30)
    assert process.returncode == code, log
    assert "Traceback" not in log
    assert "what was sealed before is kept" in log
    assert run("prepare", tiny_toml, *options[:3], "tokens.workers=1", *options[4:]).exit_code == 0
    assert not list(tmp_path.rglob(".*.tmp"))  # a signal between two lines may leave one; the next run sweeps it
