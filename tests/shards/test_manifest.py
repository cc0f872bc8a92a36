"""The manifest comes from strangers: what is not exactly one is refused with one kind of error."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ConfigError, CorruptError, Manifest
from shards.manifest import decode, encode


def test_round_trip_is_byte_identical(tiny_folder: Path) -> None:
    data = (tiny_folder / "manifest.json").read_bytes()
    assert encode(decode(data, Manifest, tiny_folder)) == data


def test_no_path_or_host_is_in_it(tiny_folder: Path) -> None:
    text = (tiny_folder / "manifest.json").read_text()
    assert str(tiny_folder.parent) not in text
    assert "/" not in text


def test_every_document_is_counted(tiny_folder: Path, texts: list[str]) -> None:
    manifest = Manifest.read(tiny_folder)
    assert manifest.complete
    assert manifest.counts.rows == len(texts)
    assert manifest.counts.text_bytes == sum(len(text.encode()) for text in texts)
    documents = sum(shard.documents for split in ("train", "val") for shard in manifest.shards(split))
    assert documents == len(texts)


def test_no_manifest(tmp_path: Path) -> None:
    with complains(ConfigError, "manifest.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(unknown=1),
        lambda m: m.pop("fingerprint"),
        lambda m: m.update(fingerprint="xyz"),
        lambda m: m.update(val_fraction=2.0),
        lambda m: m["parts"][0]["train"].update(file="../../etc/passwd"),
        lambda m: m["parts"][0]["train"].update(file=".hidden"),
        lambda m: m["parts"][0]["train"].update(file="a/b.bin"),
        lambda m: m["parts"][0]["train"].update(tokens=-1),
        lambda m: m["parts"][0]["train"].update(tokens=2**63),
        lambda m: m["parts"][0]["train"].update(tokens=True),
        lambda m: m["tokenizer"].update(pattern="(a+)+$"),
        lambda m: m.update(placement="between"),
    ],
)
def test_what_is_not_in_the_schema_is_refused(tiny_folder: Path, tmp_path: Path, change: object) -> None:
    manifest = json.loads((tiny_folder / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with complains(CorruptError, "manifest.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[" * 100_000, b'{"val_fraction": ' + b"1" * 5000 + b"}", b"null", b"{}"],
    ids=["empty", "not UTF-8", "deep", "5,000 digits", "null", "no fields"],
)
def test_bytes_that_are_no_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CorruptError):
        Manifest.read(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_raises_nothing_foreign(tiny_folder: Path, data: st.DataObject) -> None:
    raw = bytearray((tiny_folder / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CorruptError):
        decode(bytes(raw), Manifest, tiny_folder)


def test_a_huge_file_is_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "folder"))
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(65 << 20)
    with complains(CorruptError, "67,108,864"):
        Manifest.read(folder)
