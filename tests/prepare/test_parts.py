"""Parts: runs of small files, pieces of large ones, as large as they are asked to be, and none without a shard."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import complains, tree

from prepare.config import CorpusConfig
from prepare.corpus.pin import pin
from prepare.parts import WHOLE, Piece, cut_by_sample, joins_or_cuts, plan_parts
from prepare.text import formats
from prepare.tokens.vocabulary import gpt2
from shards import Manifest, RefusedError, TokenFolder, verify
from shards.manifest import MAX_BYTES, CutRecord, PartRecord, SourceRecord

Prepare = Callable[..., Path]
WRITE: dict[str, Callable[[Path, list[str]], object]] = {
    ".txt": lambda path, texts: path.write_text(texts[0]),
    ".md": lambda path, texts: path.write_text(texts[0]),
    ".jsonl": lambda path, texts: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts)),
    ".json": lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts])),
    ".csv": lambda path, texts: path.write_text("text\n" + "".join(f"{text}\n" for text in texts)),
    ".tsv": lambda path, texts: path.write_text("text\n" + "".join(f"{text}\n" for text in texts)),
    ".parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path),
    ".arrow": lambda path, texts: _arrow(path, texts),
}


def _arrow(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)


def text(i: int) -> str:
    return f"Document number {i} is about {i * i} and {i % 7} things. " * 4


@pytest.mark.slow
@pytest.mark.parametrize("suffix", formats.FORMATS)
def test_small_files_are_one_part_in_the_order_of_their_names(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    count = 1 if suffix in (".txt", ".md") else 3
    texts = [text(i) for i in range(40 * count)]
    for i in range(40):
        WRITE[suffix](tmp_path / f"doc-{i:03}{suffix}", texts[i * count : i * count + count])
    pattern = tmp_path / f"*{suffix}"
    folder = TokenFolder(prepare(pattern, tokens__val_fraction=0.2))
    (part,) = folder.manifest.parts
    assert (part.source, part.last_source, part.ends_source, part.first, part.last) == (0, 39, True, 0, 0)
    assert folder.manifest.complete and part.counts.rows == 40 * count
    found = {
        split: [shard.document(i) for shard in folder.shards(split) for i in range(shard.header.documents)]
        for split in ("train", "val")
    }
    decoded = {
        split: [folder.tokenizer.decode(tokens[1:]) for tokens in documents] for split, documents in found.items()
    }
    kept = set(decoded["val"])
    assert decoded["train"] == [each for each in texts if each not in kept]
    assert decoded["val"] == [each for each in texts if each in kept] and decoded["val"]
    assert verify(folder.path) == []
    two = prepare(pattern, home="two", tokens__val_fraction=0.2, tokens__workers=2, tokens__part_tokens=10_000 * count)
    again = prepare(
        pattern, home="one", tokens__val_fraction=0.2, tokens__workers=1, tokens__part_tokens=10_000 * count
    )
    assert tree(two) == tree(again)
    several = TokenFolder(two)
    assert len(several.manifest.parts) > 1
    for split in ("train", "val"):
        assert np.array_equal(
            several.stream(split).window(0, len(several.stream(split))),
            folder.stream(split).window(0, len(folder.stream(split))),
        )


def test_a_run_ends_at_a_large_file_and_where_the_split_changes(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": text(j)}) + "\n" for j in range(300 if i == 3 else 2))
        )
    config = CorpusConfig(kind="files", files=(f"{tmp_path}/*.jsonl",), val_files=(f"{tmp_path}/1.jsonl",))
    corpus = pin(config, tmp_path)
    cut = CutRecord(scale=1000, packed=1000)
    parts = list(plan_parts(corpus, 10_000, cut=cut))
    names = [[piece.path.stem for piece in part.pieces] for part in parts]
    assert names[:2] == [["1"], ["0", "2"]] and names[-1] == ["4", "5"]
    assert names[2:-1] and {tuple(each) for each in names[2:-1]} == {("3",)}
    assert [part.index for part in parts] == list(range(len(parts)))
    assert parts[1].pieces == (Piece(tmp_path / "0.jsonl", 0, WHOLE), Piece(tmp_path / "2.jsonl", 0, WHOLE))
    sealed = {1: sealed_record(parts[1].source, parts[1].last_source)}
    assert [part.index for part in plan_parts(corpus, 10_000, sealed, cut)] == [0, *range(2, len(parts))]


def sealed_record(source: int, last_source: int | None) -> PartRecord:
    empty = {
        "tokens": 0,
        "documents": 0,
        "nbytes": 0,
        "max_id": -1,
        "sha256": "0" * 64,
        "xxh3": "0" * 16,
        "docs_sha256": "0" * 64,
    }
    found = {"source": source, "last_source": last_source, "first": 0, "last": 0, "ends_source": True, "counts": {}}
    shards = {split: {"file": f"{split}-00001.bin", **empty} for split in ("train", "val")}
    return msgspec.convert({**found, **shards}, PartRecord)


TEXTS = {
    "English": [text(i) for i in range(4000)],
    "Chinese": ["的一是在不了有和人这中大为上个国我以要他" * 20 + str(i) for i in range(1500)],
    "code": [f"def f_{i}(x):\n        return [x[{i}][j] for j in range({i})]\n\n\n" * 4 for i in range(3000)],
    "repeated": ["ab" * 200 + "=" * 400 + str(i) for i in range(3000)],
}


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_parts_are_as_large_as_they_are_asked_to_be(
    prepare: Prepare, tmp_path: Path, language: str, suffix: str
) -> None:
    """Within a fifth, whatever a token's bytes; the last one has what is left."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS[language]}), path, row_group_size=3, use_dictionary=False)
    else:
        WRITE[suffix](path, TEXTS[language])
    parts = Manifest.read(prepare(path, tokens__part_tokens=20_000)).parts
    assert len(parts) > 2
    assert all(0.8 * 20_000 <= part.tokens <= 1.2 * 20_000 for part in parts[:-1]), [part.tokens for part in parts]


def test_the_sample_is_bounded(tmp_path: Path) -> None:
    """A word of a million letters is no trap, and a file that is not needed is not looked at."""
    (tmp_path / "a.txt").write_text("a" * 3_000_000)
    (tmp_path / "b.txt").write_text("b")
    corpus = pin(CorpusConfig(kind="files", files=(f"{tmp_path}/*.txt",)), tmp_path)
    (tmp_path / "b.txt").unlink()
    assert cut_by_sample(corpus, gpt2()).scale > 0


def test_what_is_one_part_in_every_plan_keeps_its_name(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    manifest = Manifest.read(prepare(tmp_path / "a.jsonl", tokens__val_fraction=0.0))
    assert not manifest.plan
    assert "plan" not in json.loads(
        (prepare(tmp_path / "a.jsonl", tokens__val_fraction=0.0) / "manifest.json").read_text()
    )
    assert not joins_or_cuts(manifest.sources, 100_000_000)


def test_a_folder_of_before_is_grown_as_it_was_cut(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text(i))
    with monkeypatch.context() as before:
        before.setattr("prepare.parts.joins_or_cuts", lambda *_: False)
        old = prepare(tmp_path / "*.txt", tokens__max_tokens=100)
    assert len(Manifest.read(old).parts) == 3
    assert prepare(tmp_path / "*.txt") == old
    assert len(Manifest.read(old).parts) == 4 and Manifest.read(old).complete
    new = prepare(tmp_path / "*.txt", home="other")
    assert new.name != old.name and len(Manifest.read(new).parts) == 1


def test_a_list_of_files_that_could_not_be_read_again_is_refused_before_the_work(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(text(i))
    monkeypatch.setattr("shards.manifest.MAX_BYTES", 1000)
    with complains(RefusedError, "3 source files", "0 parts", "1,000"):
        prepare(tmp_path / "*.txt")
    assert not list((tmp_path / "home" / "tokens").glob("*"))


def test_a_manifest_of_many_files_is_small(tmp_path: Path) -> None:
    sources = [
        SourceRecord(name=f"texts/doc-{i:06}.txt", nbytes=200, digest="sha256:" + "0" * 64) for i in range(20_000)
    ]
    assert len(msgspec.json.format(msgspec.json.encode(sources), indent=2)) < 4_000_000 < MAX_BYTES


@pytest.mark.slow
def test_thirty_thousand_parts_are_read_again(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(1))
    folder = prepare(tmp_path / "a.txt", tokens__val_fraction=0.0)
    manifest = Manifest.read(folder)
    (part,), replace = manifest.parts, msgspec.structs.replace
    files = [
        {split: replace(getattr(part, split), file=f"{split}-{i:05}.bin") for split in ("train", "val")}
        for i in range(30_000)
    ]
    many = replace(manifest, parts=[replace(part, source=0, **each) for each in files])
    many.write(folder)
    assert Manifest.read(folder) == many
    with complains(RefusedError, "67,108,864"):
        replace(manifest, sources=manifest.sources * 600_000).write(folder)
    assert Manifest.read(folder) == many


def test_no_shard_without_a_token(prepare: Prepare, tmp_path: Path) -> None:
    """llm.c stops at one; its records say that there is none."""
    for name in ("train", "mine"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(20)))
    for settings in ({"corpus__val_files": [str(tmp_path / "mine.jsonl")]}, {"tokens__val_fraction": 0.0}):
        folder = TokenFolder(
            prepare(tmp_path / "train.jsonl", home=str(len(settings)) + next(iter(settings)), **settings)
        )
        on_disk = {path.name for path in folder.path.glob("*.bin")}
        records = [shard for part in folder.manifest.parts for shard in (part.train, part.val)]
        assert {shard.file for shard in records if shard.tokens} == on_disk
        assert all(shard.nbytes == 0 for shard in records if not shard.tokens)
        assert all(np.fromfile(path, "<i4", 3)[2] > 0 for path in folder.path.glob("*.bin"))
        assert verify(folder.path) == []
