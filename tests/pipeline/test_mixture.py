"""A run over several token folders: pinned, exact, resumed like any other; folders that do not fit together refused."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from harness import TINY, command, millpond, prepared, results, states

from pipeline.cli.main import main
from pipeline.config import load
from pipeline.home import runs
from pipeline.home.layout import Layout
from shards import Manifest


class Home(NamedTuple):
    """A home with two folders that can be mixed, `left` being able to grow, and the recipe that mixes them."""

    path: Path
    left: str
    right: str
    recipe: Path
    grow: Path


@pytest.fixture(scope="module")
def built(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = tmp_path_factory.mktemp("home")
    files = home / "texts"
    files.mkdir()
    for name, rows in (("left", texts[:1200]), ("right", texts[1200:])):
        (files / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    tables = TINY[: TINY.index("[model]")]
    left, right = files / "left.toml", files / "right.toml"
    left.write_text(tables.format(files=files / "left.jsonl").replace('"tiny"', '"left"'))
    first = prepared(load(str(left), ("tokens.max_tokens=100_000",))[1], home)
    ours = f'"{first / "tokenizer.json"}"'
    second = tables.format(files=files / "right.jsonl").replace('"tiny"', '"right"')
    right.write_text(second.replace('"bpe"\nvocab_size = 512', ours))
    names = first.name, prepared(load(str(right))[1], home).name
    recipe = home / "mixed.toml"
    mix = f"[tokens]\nmix = {{ {names[0]} = 0.7, {names[1]} = 0.3 }}\n"
    recipe.write_text(mix + TINY[TINY.index("[model]") :])
    return Home(home, *names, recipe, left)


@pytest.fixture
def home(built: Home, tmp_path: Path) -> Home:
    shutil.copytree(built.path / "tokens", tmp_path / "home" / "tokens")
    return built._replace(path=tmp_path / "home")


def run(verb: str, *arguments: object, home: Home) -> Result:
    return CliRunner().invoke(main, [verb, *map(str, arguments), "--home", str(home.path)])


def refused(result: Result, code: int, count: int = 3) -> list[str]:
    assert result.exit_code == code, (result.stderr, result.exception)
    return result.stderr.splitlines()[-count:]


def rows(home: Path) -> list[dict[str, Any]]:
    return results(home / "runs" / "mixed" / "metrics.jsonl")


def test_a_mixture_is_trained_and_measured(home: Home) -> None:
    done = run("train", home.recipe, home=home)
    assert done.exit_code == 0, done.stderr
    assert not (home.path / "raw").exists()
    last = [row for row in rows(home.path) if "val_loss" in row][-1]
    parts = last["val_loss_by_folder"]
    assert list(parts) == [home.left, home.right]
    seven, three = 4096 * 7 // 10 // 32, 4096 * 3 // 10 // 32  # windows
    assert last["val_tokens"] == (seven + three) * 32
    assert last["val_loss"] == pytest.approx((parts[home.left] * seven + parts[home.right] * three) / (seven + three))
    found = json.loads(run("evaluate", "mixed", "--tokens", 4096, "--json", home=home).stdout)
    assert {key: found[key] for key in ("val_loss", "val_bpb", "val_tokens", "val_loss_by_folder")} == {
        key: last[key] for key in ("val_loss", "val_bpb", "val_tokens", "val_loss_by_folder")
    }
    assert found["token_folder"] == f"{home.left}, {home.right}"
    words = run("evaluate", "mixed", home=home).stdout.splitlines()
    assert [line.split(":")[0] for line in words[2:]] == [f"  {home.left}", f"  {home.right}"]
    assert run("sample", "mixed", "--tokens", 3, home=home).exit_code == 0
    pinned = runs.pinned(Layout(home.path).run("mixed"))
    assert [(one.folder, one.weight, one.parts) for one in pinned.folders] == [
        (name, weight, len(Manifest.read(home.path / "tokens" / name).parts))
        for name, weight in ((home.left, 0.7), (home.right, 0.3))
    ]
    assert "every token folder is used" in CliRunner().invoke(main, ["shards", "gc", "--home", str(home.path)]).output
    again = run("train", home.recipe, home=home)
    assert "already done" in again.stderr.splitlines()[-1]
    drift = run("train", home.recipe, "--set", f"tokens.mix={{{home.left}=1, {home.right}=0.3}}", home=home)
    assert refused(drift, 1)
    states(drift.stderr, "run mixed", f"  tokens.mix.{home.left}: 0.7 -> 1.0\n", "millpond resume mixed", "--fresh")
    corpus = run("train", home.grow, "--name", "mixed", "--set", "train.steps=60", home=home)
    assert corpus.exit_code == 1 and "  tokens.mix: {" in corpus.stderr and "fetch" not in corpus.stderr
    single = run("train", home.recipe, "--set", f"tokens.mix={{{home.left}=0.7}}", home=home)
    assert refused(single, 1, 5)[1:3] == [
        f"  token_folder: None -> {home.left}",
        f"  tokens.mix: {{'{home.left}': 0.7, '{home.right}': 0.3}} -> None",
    ]
    longer = run("resume", "mixed", "--steps", 62, home=home)
    assert longer.exit_code == 0 and "mixed: 60 steps become 62" in longer.stderr, longer.stderr
    assert rows(home.path)[-1]["val_loss_by_folder"].keys() == parts.keys()


@pytest.mark.slow
def test_killed_and_grown_and_resumed_it_is_the_same_run(home: Home, tmp_path: Path) -> None:
    calm = home._replace(path=tmp_path / "calm")
    shutil.copytree(home.path, calm.path)
    options = ("--set", "train.steps=150", "--set", "train.checkpoint_every=20")
    assert run("train", home.recipe, *options, home=calm).exit_code == 0
    asked = ("train", home.recipe, *options, "--home", home.path)
    process = subprocess.Popen(command(*asked), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (home.path / "runs" / "mixed" / "checkpoints" / "step-000040").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    before = len(Manifest.read(home.path / "tokens" / home.left).parts)
    assert run("prepare", home.grow, home=home).exit_code == 0
    assert len(Manifest.read(home.path / "tokens" / home.left).parts) > before
    assert millpond(*asked).returncode == 0
    assert rows(home.path) == rows(calm.path)
    ends = [json.loads((one / "runs" / "mixed" / "receipt.json").read_text()) for one in (home.path, calm.path)]
    assert ends[0]["result"] == ends[1]["result"]


def test_a_mixture_may_be_given_folder_by_folder(home: Home, tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text(TINY[TINY.index("[model]") :])
    settings = (f"tokens.mix.{home.left}=0.7", f"tokens.mix.{home.right}=0.3")
    assert load(str(plain), settings)[1] == load(str(home.recipe))[1]
    both = f"tokens.mix={{{home.left}=0.7,{home.right}=0.3}}"
    assert load(str(plain), (both,))[1] == load(str(home.recipe))[1]
    assert refused(run("train", plain, "--set", "tokens.mix=3", "--set", f"{settings[0]}", home=home), 2) == [
        f"error: --set {settings[0]}: tokens.mix has a value already, and no names below it",
        "only a table, as tokens.mix is, has names below it",
        "hint: --set tokens.mix=VALUE; for a table {NAME=VALUE}",
    ]


@pytest.mark.parametrize(
    ("left", "right", "shares", "odd"),
    [
        (0.7, 0.3, ["70 %", "30 %"], None),
        (0.7, 0.2, ["77.8 %", "22.2 %"], "add up to 0.9, not to 1"),
        (3, 1, ["75 %", "25 %"], None),
    ],
)
def test_the_shares_of_a_mixture_are_said(
    home: Home, left: float, right: float, shares: list[str], odd: str | None
) -> None:
    said = run("prepare", home.recipe, "--set", f"tokens.mix={{{home.left}={left},{home.right}={right}}}", home=home)
    assert said.exit_code == 0, said.stderr
    assert [
        line.split("  ")[-1].split(" of the mix")[0] for line in said.stderr.splitlines() if "of the mix" in line
    ] == shares
    assert (odd is None) == ("add up to" not in said.stderr) and (odd or "") in said.stderr


def mixed(home: Home, other: str, weight: float = 0.3) -> Result:
    return run("train", home.recipe, "--set", f'tokens.mix={{ {home.left} = 0.7, "{other}" = {weight} }}', home=home)


def test_a_folder_that_is_not_there(home: Home) -> None:
    assert refused(mixed(home, "rihgt"), 2) == [
        "error: no token folder 'rihgt'",
        f"under {home.path}/tokens there are: {home.left}, {home.right}",
        "hint: millpond shards ls",
    ]


@pytest.mark.parametrize(("weight", "shown"), [(0, "0"), (-1.5, "-1.5"), (float("nan"), "nan")])
def test_a_weight_that_is_none(home: Home, weight: float, shown: str) -> None:
    assert refused(mixed(home, home.right, weight), 2) == [
        f"error: tokens.mix: the weight of {home.right} is {shown}",
        "each folder gives windows in proportion to its weight, a number above 0",
        f"hint: leave {home.right} out, or give it one",
    ]


def test_a_folder_and_a_mixture(home: Home) -> None:
    assert refused(run("train", home.recipe, "--set", f"tokens.folder={home.left}", home=home), 2) == [
        f"error: tokens.folder is {home.left}, and tokens.mix is set too",
        "a run learns from the one folder or from the mixture",
        "hint: leave one of them out",
    ]


def test_there_is_nothing_to_fetch(home: Home) -> None:
    for verb in ("fetch", "tokenize"):
        assert refused(run(verb, home.recipe, home=home), 2)[0] == (
            f"error: tokens.mix is {home.left}, {home.right}: there is nothing to fetch or to tokenize"
        )
    assert run("verify", home.recipe, home=home).exit_code == 0


def test_a_folder_of_another_tokenizer(home: Home) -> None:
    other = prepared(load(str(home.grow), ("corpus.name=other", "tokens.vocab_size=300"))[1], home.path)
    shas = [Manifest.read(home.path / "tokens" / name).tokenizer.ranks_sha256[:12] for name in (home.left, other.name)]
    names = [Manifest.read(home.path / "tokens" / name).tokenizer.name for name in (home.left, other.name)]
    said = mixed(home, other.name)
    assert refused(said, 2)
    facts = [
        f"  {home.left}: {names[0]} (512 tokens, sha256 {shas[0]}…",
        f"  {other.name}: {names[1]} (300 tokens, sha256 {shas[1]}…",
    ]
    states(said.stderr, "tokens.mix", "tokens.tokenizer", *facts)


def test_folders_that_are_split_by_different_rules(home: Home, tmp_path: Path) -> None:
    tokenizer = f"tokens.tokenizer={home.path / 'tokens' / home.left / 'tokenizer.json'}"
    alike = (tokenizer, "tokens.vocab_size=0", "corpus.name=other")
    by_hash = "documents are validation by their hash, val_fraction"
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": "what is validation here " * 20}) + "\n")
    for settings, said in (
        (("tokens.val_fraction=0.2",), f"{by_hash} 0.2"),
        ((f"corpus.val_files={tmp_path}/mine.jsonl",), "its own files are validation"),
    ):
        other = prepared(load(str(home.grow), (*alike, *settings))[1], home.path)
        assert refused(mixed(home, other.name), 2, 5) == [
            "error: tokens.mix: the folders are not split by the same rule:",
            f"  {home.left}: {by_hash} 0.1",
            f"  {other.name}: {said}",
            "a text could be validation in one and training in another, and the validation loss would say too little",
            "hint: prepare them again with the same tokens.val_fraction, and without corpus.val_files",
        ]


def test_a_folder_that_is_too_small_for_a_window(home: Home) -> None:
    options = ("--set", "model.seq_len=40000", "--set", "train.batch_tokens=40000")
    found = refused(run("train", home.recipe, *options, home=home), 1)
    assert found[0].endswith("tokens, one window takes 40,001")
    assert not (home.path / "runs" / "mixed").exists()
