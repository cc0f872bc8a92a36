"""A run keeps its tokenizer: what is asked of its weights alone needs no training data."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from harness import litter, run, states, tree

from pipeline.home import kept_tokenizer
from pipeline.home.layout import Layout, RunPaths
from prepare.tokens import vocabulary
from shards import HostError, Manifest, TokenFolder, Tokenizer
from shards.manifest import encode
from train.state import checkpoint as checkpoints

ONE_STEP = ("--set", "train.steps=1")
SAMPLE = ("--prompt", "Return the", "--tokens", 12)


@pytest.fixture(scope="module")
def trained(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run("train", tiny_toml, "--home", home, "--set", "train.steps=4")
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


@pytest.fixture
def elsewhere(trained: Path, tmp_path: Path) -> Path:
    """Another home with the run alone."""
    shutil.copytree(trained / "runs", tmp_path / "elsewhere" / "runs")
    return tmp_path / "elsewhere"


def run_of(home: Path) -> RunPaths:
    return Layout(home).run("tiny")


def tokens_of(home: Path) -> Path:
    (folder,) = (home / "tokens").iterdir()
    return folder


def test_the_files_are_those_of_the_token_folder(trained: Path) -> None:
    kept, folder = run_of(trained).tokenizer, tokens_of(trained)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()
    record = json.loads((kept / "record.json").read_text())
    assert (record["vocab_size"], record["eot"]) == (512, 511)
    assert not litter(trained)


def test_a_run_in_another_home_is_sampled_from(trained: Path, elsewhere: Path) -> None:
    before = tree(elsewhere)
    for options in ((), ("--best",)):
        found = run("sample", "tiny", *SAMPLE, *options, "--home", elsewhere).stdout
        assert found == run("sample", "tiny", *SAMPLE, *options, "--home", trained).stdout
    assert tree(elsewhere) == before


@pytest.mark.slow
def test_evaluate_says_which_tokens_it_needs(trained: Path, elsewhere: Path) -> None:
    name = tokens_of(trained).name
    said = run("evaluate", "tiny", "--home", elsewhere, code=1).stderr
    assert f"error: evaluate needs the tokens {name}, which are not in this home, {elsewhere}\n" in said
    assert "millpond shards pull" in said and f"millpond prepare {run_of(elsewhere).recipe}" in said
    run("shards", "pull", tokens_of(trained), "--home", elsewhere)
    found = [json.loads(run("evaluate", "tiny", "--json", "--home", each).stdout) for each in (trained, elsewhere)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_command_that_evaluate_names_makes_the_tokens(trained: Path, elsewhere: Path) -> None:
    run("prepare", run_of(elsewhere).recipe, "--home", elsewhere)
    assert tree(tokens_of(elsewhere)) == tree(tokens_of(trained))
    run("evaluate", "tiny", "--home", elsewhere)


def test_a_run_of_a_folder_that_is_named_cannot_prepare_it(tiny_toml: Path, home: Path) -> None:
    folder = tokens_of(home)
    run("train", tiny_toml, "--name", "named", "--set", f"tokens.folder={folder.name}", "--home", home, *ONE_STEP)
    shutil.rmtree(folder)
    said = run("evaluate", "named", "--home", home, code=1).stderr
    assert "millpond shards pull" in said and "millpond prepare" not in said


def test_a_token_folder_without_its_manifest(home: Path) -> None:
    (tokens_of(home) / "manifest.json").unlink()
    said = run("evaluate", "tiny", "--home", home, code=1).stderr
    assert f"{tokens_of(home).name}, whose manifest.json is missing in this home, {home}\n" in said
    run("sample", "tiny", *SAMPLE, "--home", home)


def test_a_run_of_the_version_before(trained: Path, home: Path, elsewhere: Path) -> None:
    """It has no tokenizer: it gets that of its token folder, while that is there."""
    shutil.rmtree(run_of(home).tokenizer)
    shutil.rmtree(run_of(elsewhere).tokenizer)
    said = run("sample", "tiny", "--home", elsewhere, code=1).stderr
    assert f"its tokens, {tokens_of(home).name}, are not in this home, {elsewhere}" in said
    expected = run("sample", "tiny", *SAMPLE, "--home", trained).stdout
    for asked in (("sample", "tiny", *SAMPLE), ("evaluate", "tiny", "--tokens", 64)):
        shutil.rmtree(run_of(home).tokenizer, ignore_errors=True)
        run(*asked, "--home", home)
        assert tree(run_of(home).tokenizer) == tree(run_of(trained).tokenizer)
    shutil.rmtree(home / "tokens")
    assert run("sample", "tiny", *SAMPLE, "--home", home).stdout == expected


def test_a_run_that_cannot_be_written_to(
    trained: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise HostError("read-only")

    monkeypatch.setattr(kept_tokenizer, "keep", fail)
    shutil.rmtree(run_of(home).tokenizer)
    expected = run("sample", "tiny", *SAMPLE, "--home", trained).stdout
    assert run("sample", "tiny", *SAMPLE, "--home", home).stdout == expected
    assert "read-only\nthe run does not keep its tokenizer" in caplog.text


def test_training_adds_it_too(tiny_toml: Path, trained: Path, home: Path) -> None:
    shutil.rmtree(run_of(home).tokenizer)
    run_of(home).receipt.unlink()
    run("train", tiny_toml, "--home", home, "--set", "train.steps=4")
    assert tree(run_of(home).tokenizer) == tree(run_of(trained).tokenizer)


def replace_tokenizer(home: Path, tokens: list[bytes]) -> None:
    kept = run_of(home).tokenizer
    record = vocabulary.save(Tokenizer("other", tokens), kept)
    (kept / "record.json").write_bytes(encode(record))


@pytest.mark.parametrize("change", ["order", "size"])
def test_a_tokenizer_that_is_not_that_of_the_weights(home: Path, change: str) -> None:
    tokens = list(TokenFolder(tokens_of(home)).tokenizer.tokens)
    tokens = [*tokens[:-2], tokens[-1], tokens[-2]] if change == "order" else tokens[:500]
    replace_tokenizer(home, tokens)
    said = run("sample", "tiny", "--home", home, code=1).stderr
    theirs = Manifest.read(tokens_of(home)).tokenizer.ranks_sha256[:12]
    assert f"the checkpoint of step 4 was trained with bpe-512 (512 tokens, sha256 {theirs}…), " in said
    states(said, f"other ({len(tokens) + 1} tokens, sha256 ")


def test_training_refuses_it_too(tiny_toml: Path, home: Path) -> None:
    """In the token folder itself, forged so that its fingerprint and its shards still fit."""
    folder = tokens_of(home)
    tokens = TokenFolder(folder).tokenizer.tokens
    record = vocabulary.save(Tokenizer("bpe-512", [*tokens[:-2], tokens[-1], tokens[-2]]), folder)
    msgspec.structs.replace(Manifest.read(folder), tokenizer=record).write(folder)
    for verb in (("resume", "tiny", "--steps", 8), ("evaluate", "tiny")):
        said = run(*verb, "--home", home, code=1).stderr
        assert "step 4 was trained with bpe-512 (512 tokens, sha256 " in said


def test_an_old_run_does_not_take_the_tokenizer_of_another_folder(tiny_toml: Path, home: Path) -> None:
    shutil.rmtree(run_of(home).tokenizer)
    folder = tokens_of(home)
    run("prepare", tiny_toml, "--set", "tokens.val_fraction=0.2", "--home", home / "other")
    shutil.rmtree(folder)
    tokens_of(home / "other").rename(folder)
    said = run("sample", "tiny", "--home", home, code=1).stderr
    assert "those of this name are other ones" in said
    assert not run_of(home).tokenizer.exists()


def test_weights_that_do_not_say_their_tokenizer(trained: Path, home: Path) -> None:
    """As in a checkpoint of the version before: the number of embeddings is compared."""
    saved = checkpoints.load_latest(run_of(home).checkpoints)
    assert saved and saved.progress.tokenizer and saved.progress.tokenizer.vocab_size == 512
    progress = msgspec.structs.replace(saved.progress, tokenizer=None)
    checkpoints.save(run_of(home).checkpoints, saved._replace(progress=progress), 1)
    expected = run("sample", "tiny", *SAMPLE, "--home", trained).stdout
    assert run("sample", "tiny", *SAMPLE, "--home", home).stdout == expected
    replace_tokenizer(home, TokenFolder(tokens_of(home)).tokenizer.tokens[:300])
    said = run("sample", "tiny", "--home", home, code=1).stderr
    states(said, "512 embeddings", "other (301 tokens, ")


def test_what_a_killed_beginning_left_is_replaced(tiny_toml: Path, trained: Path, home: Path) -> None:
    """The tokenizer is there before run.toml says that the run is; the next run of the name may be another one."""
    kept = Layout(home).run("next").tokenizer
    kept.mkdir(parents=True)
    (kept / "tokenizer.tiktoken").write_text("of another vocabulary")
    run("train", tiny_toml, "--name", "next", "--set", "train.steps=1", "--home", home)
    assert tree(kept) == tree(run_of(trained).tokenizer)


def test_damage_to_the_kept_tokenizer(home: Path) -> None:
    path = run_of(home).tokenizer / "tokenizer.tiktoken"
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path}: sha256 is" in run("sample", "tiny", "--home", home, code=4).stderr


def test_status_says_where_the_tokens_are(trained: Path, elsewhere: Path) -> None:
    for home, here in ((trained, True), (elsewhere, False)):
        (row,) = json.loads(run("status", "--json", "--home", home).stdout)["runs"]
        assert row["token_folders"] == [tokens_of(trained).name]
        assert (row["tokens_here"], row["tokenizer"], row["vocab_size"]) == (here, "bpe-512", 512)
        assert ("its tokens are not here" in run("status", "--home", home).stdout) != here
    run_of(elsewhere).tokens.write_text("garbage")
    (row,) = json.loads(run("status", "--json", "--home", elsewhere).stdout)["runs"]
    assert (row["token_folders"], row["tokenizer"], row["state"]) == ([], None, "done")
