"""The same text gives the same bytes: whatever the workers, the engine, the interruptions and the steps it grew in."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import TINY, command, complains, millpond, pipeline_of, tree

from pipeline.config import load
from prepare import part_builder
from prepare.tokens import vocabulary
from prepare.tokens.encode import Encoded, Encoder
from shards import CorruptError, Manifest, TokenFolder, verify

Prepare = Callable[..., Path]


@pytest.fixture
def parquet(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100)
    return path


def test_every_id_is_tiktokens(prepare: Prepare, parquet: Path, texts: list[str]) -> None:
    folder = TokenFolder(prepare(parquet, tokens__val_fraction=0.1))
    assert folder.tokenizer.name == "gpt2"
    right = {hashlib.sha256(text.encode()).digest(): folder.tokenizer.encode(text) for text in texts}
    seen = 0
    for split in ("train", "val"):
        for shard in folder.shards(split):
            for i in range(shard.header.documents):
                document = shard.document(i)
                assert document[0] == 50256
                text = folder.tokenizer.decode(document[1:])
                assert document[1:].tolist() == right[hashlib.sha256(text.encode()).digest()]
                seen += 1
    assert seen == len(texts)
    assert len(folder.stream("val")) > 1000


def test_workers_and_engines_change_nothing(prepare: Prepare, parquet: Path) -> None:
    trees = {}
    for workers, engine in ((1, "fastokens"), (1, "tiktoken"), (2, "fastokens"), (3, "tiktoken")):
        home = f"{workers}-{engine}"
        folder = prepare(parquet, home=home, tokens__workers=workers, tokens__engine=engine, tokens__part_tokens=30_000)
        trees[home] = {"name": folder.name.encode(), **tree(folder)}
    first = trees.pop("1-fastokens")
    assert len([name for name in first if name.startswith("train-") and name.endswith(".bin")]) > 3
    assert not any(name.startswith(".") for name in first)
    for home, other in trees.items():
        assert other == first, home


@pytest.mark.slow
def test_locale_time_zone_and_hash_seed_change_nothing(parquet: Path, tmp_path: Path) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{parquet}"]\n[tokens]\npart_tokens = 50000\nworkers = 1\n')
    found = []
    for i, environment in enumerate(
        ({"PYTHONHASHSEED": "1", "TZ": "UTC"}, {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo"})
    ):
        arguments = command("prepare", toml, "--home", tmp_path / str(i))
        subprocess.run(arguments, env={**os.environ, **environment}, check=True, capture_output=True)
        found.append(tree(tmp_path / str(i) / "tokens"))
    assert found[0] == found[1]


@pytest.mark.parametrize("suffix", ["before", "after"])
def test_placement(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Hello, world", "Hi")))
    folder = TokenFolder(prepare(path, tokens__eot=suffix, tokens__val_fraction=0.0))
    hello, hi, eot = [15496, 11, 995], [17250], [50256]
    expected = eot + hello + eot + hi if suffix == "before" else hello + eot + hi + eot
    assert folder.stream("train").window(0, 6).tolist() == expected
    assert folder.shards("train")[0].documents["start"].tolist() == ([0, 4])
    assert verify(folder.path) == []
    assert len(folder.stream("val")) == 0


def test_nasty_text_comes_back_or_is_counted(prepare: Prepare, tmp_path: Path) -> None:
    nasty = [
        "emoji 👩‍👩‍👧‍👦",
        "漢字かな交じり文 and देवनागरी",
        "NUL \x00 byte",
        "CRLF\r\nline\r\n",
        "not the token: <|endoftext|>",
        "a" * 1_000_000,
        "\ud800 lone",
        "",
        None,
    ]
    path = tmp_path / "nasty.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in nasty))
    folder = TokenFolder(prepare(path, tokens__val_fraction=0.0))
    shard = folder.shards("train")[0]
    back = [folder.tokenizer.decode(shard.document(i)[1:]) for i in range(shard.header.documents)]
    assert back == [*nasty[:6], "\ufffd lone"]
    counts = folder.manifest.counts
    assert counts.dropped == {"null": 1, "empty": 1}
    assert (counts.rows, counts.repaired, counts.literal_eot) == (9, 1, 1)
    assert np.count_nonzero(shard.tokens == 50256) == 7  # one a document: the literal never became the token


@pytest.mark.slow
def test_a_document_larger_than_a_batch(prepare: Prepare, tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged, that a large document must be in want of a shard. " * 100_000
    (tmp_path / "large.txt").write_text(text)
    folder = TokenFolder(prepare(tmp_path / "large.txt", tokens__val_fraction=0.0))
    assert folder.tokenizer.decode(folder.stream("train").window(1, len(folder.stream("train")) - 1)) == text


@pytest.mark.slow
def test_growing_in_steps_is_growing_at_once(prepare: Prepare, parquet: Path) -> None:
    options = {"tokens__part_tokens": 20_000, "home": "steps"}
    folder = prepare(parquet, tokens__max_tokens=50_000, **options)
    small = tree(folder)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    manifest = Manifest.read(folder)
    tokens = manifest.tokens("train") + manifest.tokens("val")
    assert tokens >= 50_000
    assert not manifest.complete
    last = manifest.parts[-1]
    assert tokens - last.train.tokens - last.val.tokens < 50_000  # not a part more than asked for
    assert prepare(parquet, tokens__max_tokens=120_000, **options) == folder
    at_once = prepare(parquet, tokens__max_tokens=120_000, tokens__part_tokens=20_000, home="once", tokens__workers=2)
    grown = tree(folder)
    assert grown == tree(at_once)
    for name, data in small.items():
        if name not in ("manifest.json", "README.md"):
            assert grown[name] == data
            assert (folder / name).stat().st_ino == before[name], name
    assert prepare(parquet, tokens__max_tokens=50_000, **options) == folder
    assert tree(folder) == grown  # asking for less takes nothing away


def test_the_sample_check_stops_a_wrong_engine(tiny_folder: Path) -> None:
    tokenizer = vocabulary.gpt2()
    encoder = Encoder(tokenizer, tiny_folder, "tiktoken")
    right = encoder.engine

    class Wrong:
        def encode(self, texts: list[str]) -> Encoded:
            ids, offsets = right.encode(texts)
            ids = ids.copy()
            ids[5] += 1
            return Encoded(ids, offsets)

    encoder.engine = Wrong()
    text = "The quick brown fox jumped sideways."
    wrong, *rest = tokenizer.encode(text)[5:]
    with complains(
        CorruptError,
        "docs.parquet, part 3, row 0: the fast engine and tiktoken disagree from token 5 on: "
        f"{[wrong + 1, *rest]} against {[wrong, *rest]}",
        "tiktoken is right by definition; shards made with the fast engine here cannot be trusted",
        "hint: run again with --set tokens.engine=tiktoken, and report the text to fastokens",
    ):
        encoder.encode([text], np.zeros(1, np.uint64), "docs.parquet, part 3")


def test_an_engine_that_gives_end_of_text(tmp_path: Path) -> None:
    encoded = Encoded(np.array([1, 50256], np.uint32), np.array([0, 2]))
    with complains(CorruptError, "50256"):
        part_builder.lay_out(encoded, 50256, "before", np.dtype("<u2"))


def test_a_killed_prepare_goes_on_and_ends_the_same(corpus_file: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, then the same command: what comes out is what an undisturbed run makes."""
    toml = tmp_path / "tiny.toml"
    toml.write_text(TINY.format(files=corpus_file).replace("40_000", "10_000"))
    pipeline_of(load(str(toml), ("tokens.workers=2",))[1], tmp_path / "calm").prepare()
    expected = tree(tmp_path / "calm" / "tokens")
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    home = tmp_path / "killed"
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command("prepare", toml, "--home", home, "--set", "tokens.workers=2"), stderr=subprocess.DEVNULL
        )
        sealed = moments.randrange(1, 12)
        while process.poll() is None and len(list(home.glob("tokens/*/.parts/*.json"))) < sealed:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills, "no run was alive to be killed"
    assert millpond("prepare", toml, "--home", home).returncode == 0
    assert tree(home / "tokens") == expected, f"seed {seed}"


def test_llmc_tiny_shakespeare(shared: Path, prepare: Prepare, tmp_path: Path) -> None:
    """Prepared as llm.c does (a blank line ends a document), our tokens are llm.c's, val shard then train shard."""
    from shards import Shard

    oracles = shared / "oracles"
    text = (oracles / "tinyshakespeare_input.txt").read_text()
    documents = [piece for piece in text.replace("\n\n", "\n\n\0").split("\0")]
    path = tmp_path / "shakespeare.parquet"
    pq.write_table(pa.table({"text": documents}), path)
    ours = TokenFolder(prepare(path, tokens__val_fraction=0.0)).stream("train")
    val, train = Shard(oracles / "llmc_tiny_shakespeare_val.bin"), Shard(oracles / "llmc_tiny_shakespeare_train.bin")
    assert not val.header.native
    theirs = np.concatenate([val.tokens, train.tokens])
    assert np.array_equal(ours.window(0, len(ours)), theirs)


@pytest.mark.parametrize(
    "name", ["fineweb_sample.parquet", "dpk_language_extreme_tokenized_test-data_input_test1.parquet"]
)
def test_real_fineweb_rows(shared: Path, prepare: Prepare, name: str) -> None:
    path = shared / "fineweb" / name
    folder = TokenFolder(prepare(path, tokens__val_fraction=0.0))
    shard = folder.shards("train")[0]
    texts = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    assert [folder.tokenizer.decode(shard.document(i)[1:]) for i in range(10)] == texts
    assert [shard.document(i)[1:].tolist() for i in range(10)] == [folder.tokenizer.encode(text) for text in texts]


@pytest.mark.slow
def test_mixed_real_documents_have_tiktokens_ids(shared: Path, prepare: Prepare) -> None:
    """2,000 of the 39,165 documents; the benchmark compares the whole set."""
    path = shared / "text" / "mix-00.parquet"
    folder = TokenFolder(prepare(path, tokens__max_tokens=1, tokens__part_tokens=1_500_000))
    ids = {}
    for shard in (*folder.shards("train"), *folder.shards("val")):
        for i in range(shard.header.documents):
            document = shard.document(i)[1:].tolist()
            ids[folder.tokenizer.decode(document)] = document
    texts = pq.ParquetFile(path).read_row_groups([0, 1], columns=["text"]).column("text").to_pylist()
    assert len(texts) == 2000
    for text in texts:
        assert ids[text] == folder.tokenizer.encode(text)
