"""What it will take is said before it begins, from footers alone, and refused there when there is no room."""

import gzip
import json
import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from local_hub import LocalHub

from pipeline.cli.main import main
from prepare import estimate
from prepare.text import rows
from shards import Manifest
from train import dry_run

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, texts: list[str], tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        files = {}
        for i in range(6):
            table = pa.table({"text": texts[i * 300 : (i + 1) * 300]})
            pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
            files[f"sample/{i}.parquet"] = (tmp_path / "a.parquet").read_bytes()
        local.commit("org/web", files)
        yield local


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    path = tmp_path / "web.toml"
    path.write_text('[corpus]\nkind = "hub"\nname = "web"\nrepo = "org/web"\nfiles = ["sample/*.parquet"]\n')
    return [str(path), "--home", str(tmp_path / "home"), "--set", "tokens.part_tokens=20000"]


def plan(recipe: list[str], *more: str) -> dict[str, object]:
    result = CliRunner().invoke(main, ["plan", *recipe, *more, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_the_plan_of_a_hub_corpus(hub: LocalHub, recipe: list[str], tmp_path: Path) -> None:
    found = plan(recipe)
    files = next(iter(hub.repos["org/web"].values()))
    assert (found["source_files"], found["files"], found["rows"]) == (6, 6, 1800)
    assert found["download"] == sum(map(len, files.values()))
    assert found["commit"] == next(iter(hub.repos["org/web"]))
    assert not list((tmp_path / "home" / "raw").rglob("*.parquet"))
    assert not (tmp_path / "home" / "tokens").exists()
    assert isinstance(found["rate"], float) and found["rate"] > 10_000
    result = CliRunner().invoke(main, ["prepare", *recipe])
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "home" / "tokens").iterdir()
    assert str(folder) == found["folder"]
    manifest = Manifest.read(folder)
    tokens = manifest.tokens("train") + manifest.tokens("val")
    assert 0.6 < found["tokens"] / tokens < 1.6  # type: ignore[operator]
    after = plan(recipe)
    assert (after["download"], after["shards"], after["peak"], after["done_tokens"]) == (0, 0, 0, tokens)


def test_only_what_max_tokens_needs(hub: LocalHub, recipe: list[str]) -> None:
    found = plan(recipe, "--set", "tokens.max_tokens=100000")
    files = found["files"]
    assert isinstance(files, int) and 1 < files < 6
    assert found["download"] == sum(map(len, list(next(iter(hub.repos["org/web"].values())).values())[:files]))


@pytest.mark.slow
def test_the_time_of_the_download_is_measured(hub: LocalHub, recipe: list[str]) -> None:
    result = CliRunner().invoke(main, ["plan", *recipe])
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("download")]
    assert re.match(r"download  [\d.]+ kB, 0 s; [\d,.]+ [kM]B/s, ", line)
    quick = plan(recipe)["download_rate"]
    hub.slow = 0.05  # before each 64 KiB
    slow = plan(recipe)["download_rate"]
    assert isinstance(quick, float) and isinstance(slow, float) and slow < 64 * 1024 / 0.05 < quick
    assert CliRunner().invoke(main, ["fetch", *recipe]).exit_code == 0
    assert plan(recipe)["download_rate"] is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.txt"])
def test_files_that_are_not_parquet_are_sampled_too(
    hub: LocalHub, recipe: list[str], texts: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CHUNK_ROWS", 10)
    monkeypatch.setattr(estimate, "SAMPLE_FILE_BYTES", 200_000)  # the end of what is read is in the middle of a row
    plain = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "csv": "text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in texts if text.strip()),
        "txt": "\n\n".join(texts),
    }[name.split(".")[1]].encode()
    hub.commit("org/web", {f"sample/{name}": gzip.compress(plain) if name.endswith(".gz") else plain})
    found = plan(recipe, "--set", f"corpus.files=sample/{name}")
    assert isinstance(found["rate"], float) and found["rate"] > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [(), ("tokens.tokenizer=bpe", "tokens.vocab_size=600")])
def test_the_sample_says_how_many_tokens(
    corpus_file: Path, tmp_path: Path, recipe: list[str], vocabulary: tuple[str, ...]
) -> None:
    """The texts have more tokens than English has, and a small vocabulary makes yet more of them."""
    settings = [word for each in ("corpus.kind=files", "corpus.repo=", *vocabulary) for word in ("--set", each)]
    settings += ["--set", f"corpus.files={corpus_file}"]
    found = plan(recipe, *settings)
    assert CliRunner().invoke(main, ["prepare", *recipe, *settings]).exit_code == 0
    manifest = Manifest.read(Path(str(found["folder"])))
    tokens = manifest.tokens("train") + manifest.tokens("val")
    assert found["tokens"] == pytest.approx(tokens, rel=0.1)
    assert isinstance(found["vocabulary_seconds"], float) and (found["vocabulary_seconds"] > 0) == bool(vocabulary)


def test_a_vocabulary_that_the_sample_is_too_small_for(corpus_file: Path, recipe: list[str]) -> None:
    settings = ("corpus.kind=files", "corpus.repo=", f"corpus.files={corpus_file}", "tokens.tokenizer=bpe")
    words = [word for each in (*settings, "tokens.vocab_size=1000000") for word in ("--set", each)]
    assert plan(recipe, *words)["vocabulary_seconds"] == 0


def test_dry_run_is_the_plan(hub: LocalHub, recipe: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["prepare", *recipe, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "files     6 of 6, 1,800 rows" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert not (tmp_path / "home" / "tokens").exists()


def test_no_room_is_said_before_the_first_byte(
    hub: LocalHub, recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    result = CliRunner().invoke(main, ["prepare", *recipe])
    assert result.exit_code == 5
    assert "this needs about" in result.output and "1,000 are free" in result.output
    assert not list((tmp_path / "home" / "raw").rglob("*.parquet"))
    assert not list((tmp_path / "home" / "tokens").rglob("*.bin"))


def test_a_file_that_is_no_parquet(hub: LocalHub, recipe: list[str]) -> None:
    hub.commit("org/web", {"sample/a.parquet": b"nothing of the kind" * 100})
    result = CliRunner().invoke(main, ["plan", *recipe])
    assert result.exit_code == 4, result.output
    assert "error: sample/a.parquet: " in result.output and "parquet file" in result.output


def test_training_is_measured_and_so_are_its_checkpoints(tiny_toml: Path, tmp_path: Path) -> None:
    options = [str(tiny_toml), "--home", str(tmp_path), "--set", "train.steps=40"]
    found = plan(options)["training"]
    assert isinstance(found, dict)
    assert (found["steps"], found["tokens"], found["measured_steps"]) == (40, 10240, 20)
    assert found["hours"] * 3600 > found["tokens"] / found["tok_per_s"] > 0
    assert found["mfu_percent"] > 0 and found["peak_source"] == "measured"
    assert found["saves"] == 4 * found["checkpoint"]
    assert not (tmp_path / "runs").exists()
    assert CliRunner().invoke(main, ["train", *options]).exit_code == 0
    (*_, newest) = sorted((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))
    assert found["checkpoint"] == pytest.approx(sum(file.stat().st_size for file in newest.iterdir()), rel=0.05)


def test_a_step_that_takes_too_long_is_not_waited_for(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "SECONDS", 1e-9)
    found = plan([str(tiny_toml), "--home", str(tmp_path)])["training"]
    assert isinstance(found, dict)
    assert (found["micro_batch"], found["measured_sequences"], found["measured_steps"]) == (8, 1, 0)
    assert found["hours"] * 3600 > found["tokens"] / found["tok_per_s"] > 0


def test_a_person_reads_both_parts(tiny_toml: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(tiny_toml), "--home", str(tmp_path)])
    assert result.exit_code == 0, result.output
    words = [line.split()[0] for line in result.stdout.splitlines()]
    assert words[:3] == ["corpus", "files", "tokens"]
    assert words[words.index("folder") + 1 :] == ["train", "device", "speed", "time", "saves"]
    assert "15.4k tokens in 60 steps, float32" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("folder")) <= 80


def test_without_a_length_nothing_is_trained(recipe: list[str], hub: LocalHub) -> None:
    assert plan(recipe)["training"] is None


def test_a_local_plan(corpus_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "local.toml"
    path.write_text(f'[corpus]\nkind = "files"\nfiles = ["{corpus_file}"]\n')
    found = plan([str(path), "--home", str(tmp_path / "home")])
    assert found["download"] == 0
    assert found["rate"] is not None


@pytest.mark.parametrize(("engine", "is_said"), [("fastokens", True), ("tiktoken", False)])
def test_the_rate_is_that_of_the_engine_that_will_do_it(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, is_said: bool
) -> None:
    """Where fastokens is not installed, and where it is not asked for: what needs it would fail."""
    monkeypatch.setitem(sys.modules, "fastokens", None)
    path = tmp_path / "local.toml"
    path.write_text(f'[corpus]\nkind = "files"\nfiles = ["{corpus_file}"]\n[tokens]\nengine = "{engine}"\n')
    result = CliRunner().invoke(main, ["plan", str(path), "--home", str(tmp_path / "home"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rate"] > 0
    assert ("fastokens is not installed here" in result.stderr) == is_said


@pytest.mark.slow
def test_a_folder_that_is_named_is_planned_too(tiny_toml: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["prepare", str(tiny_toml), "--home", str(tmp_path)]).exit_code == 0
    (folder,) = (tmp_path / "tokens").iterdir()
    found = plan([str(tiny_toml), "--home", str(tmp_path), "--set", f"tokens.folder={folder.name}"])
    assert found["tokens"] == found["done_tokens"] > 0
    assert (found["download"], found["peak"]) == (0, 0)
    assert isinstance(found["training"], dict) and found["training"]["hours"] > 0


def test_hours_that_are_no_number(tiny_toml: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["train", str(tiny_toml), "--home", str(tmp_path), "--max-hours", "nan"])
    assert done.exit_code == 2 and "--max-hours: nan " in done.stderr
