"""Corpora: what is named, what is local, what is installed."""

import os
from pathlib import Path

import pytest
from harness import complains

from prepare.config import CorpusConfig
from prepare.corpus import pin, python_docs
from prepare.corpus.python_docs import Package, docstrings
from prepare.parts import plan_parts
from shards import ConfigError, CorruptError


def files(*patterns: str) -> CorpusConfig:
    return CorpusConfig(kind="files", files=patterns)


def test_local_files_are_named_from_their_common_folder_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/9.txt", "b/10.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = pin.pin(files(f"{tmp_path}/b/*.txt", f"{tmp_path}/a/9.txt", f"{tmp_path}/**/9.txt"), tmp_path)
    assert [source.name for source in corpus.sources] == ["a/9.txt", "b/10.txt", "b/2.txt"]
    assert [corpus.path(i).read_text() for i in range(3)] == ["a/9.txt", "b/10.txt", "b/2.txt"]


def test_a_missing_file(tmp_path: Path) -> None:
    with complains(
        ConfigError,
        f"corpus.files: no file matches '{tmp_path}/none*.parquet'",
        "hint: check the path",
    ):
        pin.pin(files(f"{tmp_path}/none*.parquet"), tmp_path)


def test_a_missing_validation_file_is_blamed_on_its_own_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held-out.txt").write_text("a")
    config = CorpusConfig(kind="files", files=("*.txt",), val_files=("heldout.txt",))
    with complains(
        ConfigError,
        f"corpus.val_files: no file matches 'heldout.txt' (looked from {tmp_path})",
        "hint: did you mean held-out.txt",
    ):
        pin.pin(config, tmp_path)


def test_a_folder_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("novels/a.txt", "novels/b.txt", "novels/c.jsonl.gz", "deep/in/it/d.parquet", "deep/e.doc", "none/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    for pattern, hint in (
        ("novels", r'novels is a folder, .*\n.*use "novels/\*\.txt", "novels/\*\.jsonl\.gz"$'),
        ("novels/", r'"novels/\*\.txt"'),
        ("deep", r'use "deep/\*\*/\*\.parquet"$'),
        ("none", r"none is a folder without files that can be read"),
    ):
        with pytest.raises(ConfigError, match=hint):
            pin.pin(files(pattern), tmp_path)


@pytest.mark.parametrize(
    "val",
    ["data/val.txt", "./data//val.txt", "data/../data/val.txt", "data/v*.txt", "LINK/val.txt", "held-out", "hard.txt"],
)
def test_validation_is_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.txt", "val.txt"):
        (tmp_path / "data" / name).write_text(f"text of {name}")
    (tmp_path / "LINK").symlink_to("data", target_is_directory=True)
    (tmp_path / "held-out").symlink_to("data/val.txt")
    (tmp_path / "hard.txt").hardlink_to("data/val.txt")
    config = CorpusConfig(kind="files", files=(f"{tmp_path}/data/*.txt",), val_files=(val,))
    if val == "held-out":  # a link without a suffix says nothing of the format
        with pytest.raises(ConfigError, match="held-out: unknown kind of file"):
            pin.pin(config, tmp_path)
        return
    corpus = pin.pin(config, tmp_path)
    found = [(corpus.path(i).read_text(), source.split) for i, source in enumerate(corpus.sources)]
    assert found == [("text of val.txt", "val"), ("text of a.txt", "train"), ("text of b.txt", "train")]


def test_a_file_that_is_reached_again_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("a")
    (tmp_path / "texts" / "same bytes.txt").write_text("a")  # another file, whatever is in it
    (tmp_path / "texts" / "hard.txt").hardlink_to(tmp_path / "texts" / "same bytes.txt")
    (tmp_path / "texts" / "b.txt").symlink_to("deep/a.txt")
    (tmp_path / "texts" / "deep" / "up").symlink_to("..", target_is_directory=True)  # a circle
    said: list[str] = []
    corpus = pin.pin(files(f"{tmp_path}/**/*.txt", f"{tmp_path}/texts/*.txt"), tmp_path, note=said.append)
    assert [source.name for source in corpus.sources] == ["deep/a.txt", "hard.txt"]
    assert said == [f"2 more paths lead to files that are read once: {tmp_path}/texts/b.txt, ..."]


def test_all_of_it_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    config = CorpusConfig(kind="files", files=(f"{tmp_path}/*.txt",), val_files=(f"{tmp_path}/a.txt",))
    with complains(ConfigError, "corpus.val_files"):
        pin.pin(config, tmp_path)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone.txt").symlink_to("missing")
    with complains(ConfigError, "gone.txt"):
        pin.pin(files(f"{tmp_path}/*.txt"), tmp_path)
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with complains(ConfigError, "loop.txt"):
        pin.pin(files(f"{tmp_path}/*.txt"), tmp_path)


def test_a_named_corpus_is_taken_whole() -> None:
    config = pin.resolve(CorpusConfig(name="fineweb-10bt", text_column="body", revision="v1", keep_raw=False))
    assert (config.text_column, config.revision, config.keep_raw) == ("body", "v1", False)
    assert pin.resolve(CorpusConfig(name="fineweb-10bt")).text_column == "text"


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("a,b")
    with complains(ConfigError, "a.doc", ".parquet", ".jsonl"):
        pin.pin(files(f"{tmp_path}/a.doc"), tmp_path)


def test_text_beside_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\1\0")
    with complains(ConfigError, "b.bin"):
        pin.pin(files(f"{tmp_path}/*"), tmp_path)


def test_no_files_at_all(tmp_path: Path) -> None:
    with complains(ConfigError, "corpus.files"):
        pin.pin(files(), tmp_path)


def test_an_unknown_name() -> None:
    with complains(ConfigError, "corpus.name", "'fineweb'", "fineweb-100bt"):
        pin.resolve(CorpusConfig(name="fineweb"))


@pytest.mark.parametrize(
    ("name", "repo", "pattern"),
    [
        ("fineweb-10bt", "HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
        ("fineweb-edu-350bt", "HuggingFaceFW/fineweb-edu", "sample/350BT/*.parquet"),
        ("fineweb-CC-MAIN-2024-10", "HuggingFaceFW/fineweb", "data/CC-MAIN-2024-10/*.parquet"),
        ("fineweb-edu-CC-MAIN-2013-20", "HuggingFaceFW/fineweb-edu", "data/CC-MAIN-2013-20/*.parquet"),
        ("fineweb10b-gpt2", "kjj0/fineweb10B-gpt2", "fineweb_train_*.bin"),
    ],
)
def test_a_named_corpus(name: str, repo: str, pattern: str) -> None:
    config = pin.resolve(CorpusConfig(name=name, filters=("len(text) >= 1",)))
    assert (config.kind, config.repo, config.files) == ("hub", repo, (pattern,))
    assert config.filters == ("len(text) >= 1",)


SOURCE = '''#!/usr/bin/env python
# a comment with """quotes"""
"""The module.

    Indented."""
x = """not a docstring"""
y = {"""neither""": "it's"}

def f(a="#", b='"'):
    r"""Raw \\d docstring."""
    return """not this"""

class A:
    # a comment between
    \'\'\'Single quotes.\'\'\'
    z = 1
'''


def test_docstrings() -> None:
    assert list(docstrings(SOURCE)) == ["The module.\n\nIndented.", "Raw \\d docstring.", "Single quotes."]


def test_the_regular_expression_finds_what_ast_finds() -> None:
    import ast
    import inspect

    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found, right = set(), set()
    for name in ("argparse", "asyncio.events", "collections", "inspect", "logging", "typing", "unittest.mock"):
        source = Path(os.fspath(__import__(name, fromlist=["x"]).__file__)).read_text()
        found |= set(docstrings(source))
        right |= {ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}
    right.discard("")
    assert inspect is not None
    assert len(found & right) > 0.9 * len(right)
    assert len(found - right) < 0.1 * len(found)


def test_python_docs_are_pinned_until_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""' + "Words about this module. " * 20 + '"""')
    packages = {"a": Package("1.0", [module], "Description of a. " * 20)}
    monkeypatch.setattr(python_docs, "installed", lambda: packages)
    config = CorpusConfig(name="python-docs")
    first = pin.pin(config, tmp_path / "raw")
    assert first.path(0).exists()
    assert first.record.details == {"a": "1.0"}
    packages["b"] = Package("2.0", [], "Description of b. " * 20)
    again = pin.pin(config, tmp_path / "raw")
    assert (again.record, again.sources) == (first.record, first.sources)
    assert pin.pin(config, tmp_path / "raw", force=True).record.details == {"a": "1.0", "b": "2.0"}
    path = tmp_path / "raw" / "python-docs.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with complains(CorruptError, "python-docs.parquet", "sha256"):
        pin.pin(config, tmp_path / "raw")


def test_what_is_installed_is_named_with_its_version() -> None:
    packages = python_docs.installed()
    assert packages["numpy"].version and packages["python"].files
    assert "millpond" not in packages
    assert len(packages["click"].description) > 200


def test_the_plan_covers_every_row_group_once(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["words " * 100] * 1000
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"n": [1] * 1000, "text": texts}),
            tmp_path / f"{name}.parquet",
            row_group_size=70,
            use_dictionary=False,
        )
    corpus = pin.pin(files(f"{tmp_path}/*.parquet"), tmp_path)
    for part_tokens in (1_000, 30_000, 10_000_000):
        parts = list(plan_parts(corpus, part_tokens))
        last_of = {part.source: part.index for part in parts}
        assert [part.index for part in parts if part.ends_source] == list(last_of.values())
        assert [part.index for part in parts] == list(range(len(parts)))
        for source in (0, 1):
            covered = [g for part in parts if part.source == source for g in range(part.first, part.last)]
            assert covered == list(range(15))
    assert len(list(plan_parts(corpus, 1_000))) == 30
    assert len(list(plan_parts(corpus, 10_000_000))) == 2
