"""millpond export: a folder that is the run's model, made once, whole or not at all."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from harness import litter, run, states, tree
from llama import llama

from pipeline import config
from pipeline import export as exporting
from pipeline.cli.main import main
from pipeline.home import kept_tokenizer, pins, runs
from pipeline.home.layout import Layout
from shards.errors import CorruptError
from train.export import check as checking
from train.trained import load_trained


@pytest.fixture(scope="module")
def trained(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    lengths = ("train.steps=4", "train.eval_every=2", "train.checkpoint_every=2", "optim.lr=0.5")
    run("train", tiny_toml, "--home", home, *(word for each in lengths for word in ("--set", each)))
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


def test_it_is_made_once(home: Path) -> None:
    first = run("export", "tiny", "--home", home)
    folder = home / "runs" / "tiny" / "export" / "hf"
    assert [Path(line) for line in first.stdout.splitlines()] == [folder, folder.with_name("gguf")]
    gguf = {"README.md", "Modelfile", "tiny-q8_0.gguf"}
    assert {path.name for path in folder.with_name("gguf").iterdir()} == gguf
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert not litter(home / "runs")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    states(run("export", "--home", home).stderr, "tiny is the newest run", "already done")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "config.json").write_text("{}")
    assert "already done" not in run("export", "tiny", "--home", home, "--format", "hf").stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    assert "already done" not in run("export", "tiny", "--home", home, "--dtype", "bf16").stderr
    assert (folder.with_name("gguf") / "tiny-bf16.gguf").exists()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_where_it_is_asked_for(home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "hf"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    states(run("export", "tiny", "--home", home, "--to", mine.parent, code=1).stderr, str(mine), "--force")
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    run("export", "tiny", "--home", home, "--to", tmp_path / "other")
    assert (tmp_path / "other" / "hf" / "model.safetensors").exists()
    run("export", "tiny", "--home", home, "--to", mine.parent, "--force")
    assert not (mine / "notes.txt").exists() and (mine / "model.safetensors").exists()


def test_the_best(home: Path) -> None:
    marked = json.loads((home / "runs" / "tiny" / "checkpoints" / "best.json").read_text())["step"]
    assert f"step {marked}" in run("export", "tiny", "--best", "--home", home).stderr
    card = (home / "runs" / "tiny" / "export" / "hf" / "README.md").read_text()
    assert f"| step | {marked} of 4 |" in card


def test_the_card_says_what_is_known_and_no_more(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    run("export", "tiny", "--home", home)
    folder = home / "runs" / "tiny" / "export"
    card = (folder / "hf" / "README.md").read_text()
    states(card, "# tiny", "Qwen3ForCausalLM", "bpe-512", "context 32", "nats per token", "d_model = 32", "20 texts")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for name, data in tree(folder).items():
        assert str(home).encode() not in data and b"hf_canary" not in data, name
    assert not re.search(r"[^`]<script|None|\[\]\(", card)
    states(
        (folder / "gguf" / "README.md").read_text(), "library_name: gguf", "llama-cli -m tiny-q8_0.gguf", "not tested"
    )


def test_what_is_not_the_model_is_not_published(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> None:
        raise CorruptError("a logit differs")

    run("export", "tiny", "--home", home)
    before = tree(home / "runs" / "tiny" / "export")
    monkeypatch.setattr(checking, "check", differs)
    states(run("export", "tiny", "--home", home, "--force", code=4).stderr, "a logit differs")
    assert tree(home / "runs" / "tiny" / "export") == before and not litter(home / "runs")


def test_without_transformers_it_says_what_was_not_compared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "can_check", lambda: False)
    states(run("export", "tiny", "--home", home).stderr, "not compared", "transformers")
    states((home / "runs" / "tiny" / "export" / "hf" / "README.md").read_text(), "not compared")


def test_eight_bits_cost_less_than_a_percent_of_perplexity(home: Path) -> None:
    pytest.importorskip("xllamacpp")
    run("export", "tiny", "--home", home, "--format", "gguf")
    layout = Layout(home)
    paths = layout.run("tiny")
    pinned = pins.pinned(paths)
    kept = kept_tokenizer.load(layout, paths, pinned)
    job = runs.job(layout, paths, config.load_run(paths.recipe), pinned)
    model = load_trained(job, kept.record, torch.device("cpu")).model
    ids = [kept.tokenizer.eot, *kept.tokenizer.encode("Return the value of the key, or a new list of them.")][:32]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :-1]
    ours = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    with llama(paths.export / "gguf" / "tiny-q8_0.gguf", 32) as server:
        theirs = [-server.logprob(ids[:i], ids[i], kept.record.vocab_size) for i in range(1, len(ids))]
    assert abs(math.exp(sum(theirs) / len(theirs) - ours) - 1) < 0.01 and len(theirs) > 15


def test_a_run_without_its_tokens_is_exported(home: Path) -> None:
    shutil.rmtree(home / "tokens")
    run("export", "tiny", "--home", home)


def test_without_gguf_nothing_is_begun(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda _: None)
    states(run("export", "tiny", "--home", home, code=3).stderr, "gguf", "[export]", "--format hf")
    assert not (home / "runs" / "tiny" / "export").exists()
    run("export", "tiny", "--home", home, "--format", "hf")


def test_a_kill_before_its_receipt_leaves_what_can_be_exported_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting.receipt, "write", killed)
        CliRunner().invoke(main, ["export", "tiny", "--home", str(home)])
    assert not (home / "runs" / "tiny" / "export" / "hf").exists()
    run("export", "tiny", "--home", home)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    states(run("export", "night", "--home", tmp_path, code=2).stderr, "no run 'night'")
