"""A run's name with another recipe, or other texts: refused before anything is tokenized, and what changed is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import TINY, run, tree

from pipeline import stages


@pytest.fixture(scope="module")
def made(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with texts, a recipe and a run of it."""
    work = tmp_path_factory.mktemp("work")
    (work / "texts").mkdir()
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::3])
        (work / "texts" / f"{number}.jsonl").write_text(lines)
    (work / "tiny.toml").write_text(TINY.format(files="texts/*.jsonl").replace("steps = 60", "steps = 4"))
    patch = pytest.MonkeyPatch()
    patch.chdir(work)
    run("train", "tiny.toml")
    patch.undo()
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = Path(shutil.copytree(made, tmp_path / "work"))
    monkeypatch.chdir(work)
    return work


def folder(work: Path) -> str:
    (path,) = (work / "data" / "tokens").iterdir()
    return path.name


def kept(work: Path) -> dict[str, bytes]:
    """All that a refusal must leave as it is."""
    return {name: data for name, data in tree(work / "data").items() if not name.startswith(("locks/", "receipts/"))}


def drift(work: Path, *arguments: str) -> list[str]:
    """What differs, line by line, as training is refused; nothing was made."""
    before = kept(work)
    lines = run("train", "tiny.toml", *arguments, code=1).stderr.splitlines()
    assert kept(work) == before
    assert "tokenize" not in {line.split(" ")[0] for line in lines}
    first = lines.index("error: run tiny exists and was made with another recipe:")
    assert lines[-2] == "resuming would mix two different configurations"
    assert "millpond resume tiny" in lines[-1] and "--name OTHER" in lines[-1] and "--fresh" in lines[-1]
    return lines[first + 1 : -2]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("optim.lr=0.01", "optim.lr: 0.025 -> 0.01"),
        ("model.n_layer=3", "model.n_layer: 2 -> 3"),
        ("train.steps=9", "train.steps: 4 -> 9"),
        ("tokens.vocab_size=600", "tokens.vocab_size: 512 -> 600"),
        ("tokens.val_fraction=0.2", "tokens.val_fraction: 0.1 -> 0.2"),
        ("tokens.dedup=true", "tokens.dedup: False -> True"),
        ("tokens.eot=after", "tokens.eot: before -> after"),
        ("corpus.name=other", "corpus.name: tiny -> other"),
        ("corpus.text_column=content", "corpus.text_column: text -> content"),
        ("corpus.filters=len(text) >= 200", "corpus.filters: [] -> ['len(text) >= 200']"),
    ],
)
def test_a_setting_is_compared_before_a_file_is_read(
    work: Path, setting: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("nothing needs to be fetched to know this")

    monkeypatch.setattr(stages.Pipeline, "fetch", fetch)
    assert drift(work, "--set", setting) == [f"  {line}"]


def test_another_tokenizer(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drift(work, "--set", "tokens.tokenizer=gpt2", "--set", "tokens.vocab_size=0")
    assert found == ["  tokens.tokenizer: bpe -> gpt2, or a file", "  tokens.vocab_size: 512 -> 0"]


def edit(path: str) -> Callable[[Path], None]:
    def change(work: Path) -> None:
        with (work / path).open("a") as file:
            file.write(json.dumps({"text": "one more document, which was not there"}) + "\n")

    return change


def flip(work: Path) -> None:
    path = work / "texts" / "1.jsonl"
    path.write_text(path.read_text().swapcase().replace('{"TEXT"', '{"text"'))


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (edit("texts/0.jsonl"), [r"  0.jsonl: changed, {0} bytes -> {0+} bytes"]),
        (flip, ["  1.jsonl: changed, {1} bytes -> {1} bytes"]),
        (edit("texts/3.jsonl"), ["  3.jsonl: is new"]),
        (lambda work: (work / "texts/2.jsonl").unlink(), ["  2.jsonl: is not there any more"]),
        (lambda work: (work / "texts/2.jsonl").rename(work / "texts/9.jsonl"), ["  9.jsonl: was called 2.jsonl"]),
    ],
)
def test_the_file_that_changed_is_named(work: Path, change: Callable[[Path], None], lines: list[str]) -> None:
    sizes = {f"{{{path.name[0]}}}": path.stat().st_size for path in (work / "texts").iterdir()}
    change(work)
    now = {f"{{{path.name[0]}+}}": path.stat().st_size for path in (work / "texts").iterdir()}
    expected = []
    for line in lines:
        for name, nbytes in (sizes | now).items():
            line = line.replace(name, f"{nbytes:,}")
        expected.append(line)
    first, *rest = drift(work)
    assert first.startswith(f"  token_folder: {folder(work)} -> tiny-")
    assert rest == expected


def test_the_ways_out_lead_on(work: Path) -> None:
    own = folder(work)
    edit("texts/0.jsonl")(work)
    assert f"--set tokens.folder={own} trains on the tokens" in run("train", "tiny.toml", code=1).stderr
    assert "already done" in run("train", "tiny.toml", "--set", f"tokens.folder={own}").stderr
    assert "already done" in run("resume", "tiny").stderr
    run("train", "tiny.toml", "--name", "other")
    assert "the run before is kept as tiny.1" in run("train", "tiny.toml", "--fresh").stderr


def test_many_files_that_changed(work: Path) -> None:
    for number in range(3, 20):
        edit(f"texts/{number:02}.jsonl")(work)
    lines = drift(work)
    assert len(lines) == 12 and lines[-1] == "  and 7 more files"


def test_the_same_files_and_another_vocabulary(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prepare.tokens import vocabulary

    monkeypatch.setattr(vocabulary.metadata, "version", lambda _: "99")
    assert drift(work)[1:] == [
        "  the files are the same: tokens.tokenizer, tokens.forbid or the tokenizers package changed"
    ]


def test_without_the_tokens_it_was_started_on(work: Path) -> None:
    own = folder(work)
    shutil.rmtree(work / "data" / "tokens")
    edit("texts/0.jsonl")(work)
    (line,) = drift(work)
    assert line.startswith(f"  token_folder: {own} -> tiny-")


def test_a_run_of_a_named_folder_and_now_of_texts(work: Path) -> None:
    """Its recipe has no corpus: the name of its folder says which one it was."""
    run("train", "tiny.toml", "--name", "named", "--set", f"tokens.folder={folder(work)}")
    assert "already done" in run("train", "tiny.toml", "--name", "named").stderr
    said = run("train", "tiny.toml", "--name", "named", "--set", "corpus.name=other", code=1).stderr
    assert "  corpus.name: tiny -> other\n" in said and "fetch" not in said


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_texts_that_are_gone(work: Path, how: str) -> None:
    """The tokens are there, so the run needs no text."""
    if how == "moved":
        (work / "texts").rename(work / "elsewhere")
    else:
        shutil.rmtree(work / "texts")
    said = run("train", "tiny.toml", code=2).stderr
    assert "error: corpus.files: " in said
    assert f"millpond resume tiny, or --set tokens.folder={folder(work)}\n" in said
    assert "already done" in run("train", "tiny.toml", "--set", f"tokens.folder={folder(work)}").stderr
    assert "already done" in run("resume", "tiny").stderr
    assert "millpond resume" not in run("train", "tiny.toml", "--name", "new", code=2).stderr
