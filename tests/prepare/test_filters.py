"""Which documents stay out: filters, repetitions, what is forbidden. All is counted, whoever does the work."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from harness import complains, tree

from prepare.text.filters import contains, parse_filters
from shards import ConfigError, Manifest, TokenFolder, verify
from shards.errors import RefusedError

Prepare = Callable[..., Path]


def hashes_of(folder: Path) -> list[int]:
    tokens = TokenFolder(folder)
    return [key for split in ("train", "val") for s in tokens.shards(split) for key in s.documents["hash"].tolist()]


def hashed(texts: list[str]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Rows as FineWeb-Edu has them, half of them with a null score."""
    rows = 300
    table = {
        "text": [f"document number {i} " * (1 + i % 7) for i in range(rows)],
        "language": ["en" if i % 3 else "de" for i in range(rows)],
        "language_score": [i / rows for i in range(rows)],
        "int_score": [None if i % 2 else i % 5 for i in range(rows)],
    }
    pq.write_table(pa.table(table), tmp_path / "scored.parquet", row_group_size=100)
    lines = [json.dumps({key: table[key][i] for key in table}) for i in range(rows)]
    (tmp_path / "scored.jsonl").write_text("\n".join(lines))
    return tmp_path / "scored.parquet"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_filters(prepare: Prepare, scored: Path, suffix: str) -> None:
    filters = ["language_score >= 0.5", 'language == "en"', "int_score>=3", "len(text) > 40"]
    folder = prepare(scored.with_suffix(suffix), corpus__filters=filters)
    rows = pq.read_table(scored).to_pylist()
    kept = [
        row["text"]
        for row in rows
        if row["language_score"] >= 0.5
        and row["language"] == "en"
        and (row["int_score"] or 0) >= 3
        and len(row["text"]) > 40
    ]
    assert 5 < len(kept) < 100
    assert sorted(hashes_of(folder)) == sorted(hashed(kept))
    manifest = Manifest.read(folder)
    assert manifest.filters == [*filters[:2], "int_score >= 3", filters[3]]
    assert list(manifest.counts.dropped) == sorted(f"not {text}" for text in manifest.filters)
    assert manifest.counts.rows - sum(manifest.counts.dropped.values()) == len(kept)
    assert manifest.counts.text_bytes == sum(map(len, kept))
    assert prepare(scored.with_suffix(suffix), corpus__filters=filters[:1]) != folder
    closed = [filter.replace(" ", "") for filter in filters]
    assert prepare(scored.with_suffix(suffix), corpus__filters=closed) == folder


def test_the_column_of_a_filter_must_be_there(prepare: Prepare, scored: Path) -> None:
    with complains(ConfigError, "'scor'", "language_score", "int_score"):
        prepare(scored, corpus__filters=["scor > 1"])
    with complains(ConfigError, "'language > 1'", "'de'", "'language'", "1"):
        prepare(scored, corpus__filters=["language > 1"])


@pytest.mark.parametrize(
    "text", ["", "score", "score > ", "score >= three", "a b > 1", "score => 3", "__import__('os')"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a condition"):
        parse_filters([text])


def test_when_nothing_is_left(prepare: Prepare, scored: Path) -> None:
    with complains(RefusedError, "300 rows", "language_score > 2"):
        prepare(scored, corpus__filters=["language_score > 2"])


@pytest.fixture
def repeated(tmp_path: Path, texts: list[str]) -> list[Path]:
    """Three files; the second repeats some of the first and itself, the third all of both."""
    a, b = texts[:400], texts[300:700] + texts[500:600]
    files = []
    for name, rows in (("a", a), ("b", b), ("c", a + b)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        files.append(path)
    return files


def test_dedup_keeps_the_first_of_equal_documents(prepare: Prepare, repeated: list[Path], texts: list[str]) -> None:
    small = {"tokens__dedup": True, "tokens__part_tokens": 10_000}
    folder = prepare(*repeated, **small)
    assert len(Manifest.read(folder).parts) > 5
    assert sorted(hashes_of(folder)) == sorted(set(hashed(texts[:700])))
    counts = Manifest.read(folder).counts
    assert counts.rows - counts.dropped["duplicate"] == len(set(hashed(texts[:700])))
    assert verify(folder) == []
    plain = prepare(*repeated, tokens__part_tokens=10_000)
    assert plain != folder
    assert len(hashes_of(plain)) == counts.rows
    assert tree(prepare(*repeated, **small, tokens__workers=3, home="pool")) == tree(folder)


@pytest.mark.slow
def test_dedup_grown_in_steps_is_dedup_at_once(prepare: Prepare, repeated: list[Path]) -> None:
    """The documents of published parts are known from their sidecars."""
    small = {"tokens__dedup": True, "tokens__part_tokens": 10_000}
    once = prepare(*repeated, **small, home="once")
    for tokens in (1, 25_000, 60_000, 0):
        folder = prepare(*repeated, **small, tokens__max_tokens=tokens, home="steps")
    assert tree(folder) == tree(once)


def test_forbidden_documents_stay_out(prepare: Prepare, repeated: list[Path], tmp_path: Path) -> None:
    a, b, _ = repeated
    other = prepare(a, tokens__val_fraction=0.2, corpus__name="other")
    banned = {key for s in TokenFolder(other).shards("val") for key in s.documents["hash"].tolist()}
    plain = prepare(a, b)
    assert banned & set(hashes_of(plain))
    for named in (other.name, str(other)):  # by its name under the same home, or by path
        folder = prepare(a, b, tokens__forbid=[named])
        assert set(hashes_of(folder)) == set(hashes_of(plain)) - banned
        counts = Manifest.read(folder).counts
        assert counts.dropped["forbidden"] == sum(key in banned for key in hashes_of(plain))
        assert Manifest.read(folder).forbidden is not None
    assert tree(prepare(a, b, tokens__forbid=[str(other)], tokens__workers=2, home="pool")) == tree(folder)
    with complains(ConfigError, "tokens.forbid", "/none"):
        prepare(a, b, tokens__forbid=[str(tmp_path / "none")])


def test_contains() -> None:
    table = np.array([3, 5, 2**64 - 1], np.uint64)
    assert contains(table, np.array([0, 3, 4, 5, 2**64 - 1], np.uint64)).tolist() == [False, True, False, True, True]
    assert contains(table[:0], table).tolist() == [False] * 3


def test_the_types_of_a_filter_must_fit() -> None:
    for text in ("a > 1", "a == 1", "a != 1"):
        with complains(ConfigError, "'1'", "'a'", "1"):
            parse_filters([text])[0].keeps(["1"])
    assert parse_filters(["a == 9007199254740993"])[0].keeps([9007199254740993, 9007199254740992]).tolist() == [
        True,
        False,
    ]
    assert parse_filters(["a != 3"])[0].keeps([float("nan"), None, 2.5]).tolist() == [False, False, True]


def test_the_same_filter_twice_is_counted_once(prepare: Prepare, scored: Path) -> None:
    folder = prepare(scored, corpus__filters=["int_score >= 3", "int_score >= 3"])
    counts = Manifest.read(folder).counts
    assert counts.rows - counts.dropped["not int_score >= 3"] == len(hashes_of(folder))
