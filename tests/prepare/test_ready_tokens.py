"""Shards that others made become a token folder like any other: verified, resumable, grown, trained on as it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from harness import complains, tree

from prepare.tokens import vocabulary
from shards import ConfigError, Manifest, ShardHeader, TokenFolder, verify
from shards.errors import CorruptError
from shards.interop import export

Prepare = Callable[..., Path]
EOT = 50256


@pytest.fixture
def llmc(tmp_path: Path, texts: list[str]) -> list[Path]:
    """llm.c's shards, documents cut where a shard is full, as its writer does: one of validation, three of training."""
    encoding = vocabulary.gpt2().encoding
    stream = np.array([i for text in texts[:600] for i in (EOT, *encoding.encode_ordinary(text))], "<u2")
    files = []
    for i, piece in enumerate(np.array_split(stream, 4)):
        path = tmp_path / f"web_{'train' if i else 'val'}_{i:06}.bin"
        path.write_bytes(np.array([20240520, 1, len(piece), *[0] * 253], "<i4").tobytes() + piece.tobytes())
        files.append(path)
    return files


def test_llmc_shards(prepare: Prepare, llmc: list[Path]) -> None:
    val, *train = llmc
    given = {"corpus__val_files": [str(val)]}
    folder = TokenFolder(prepare(*train, **given))
    manifest = folder.manifest
    assert [source.split for source in manifest.sources] == ["val", "train", "train", "train"]
    assert manifest.placement is None
    for split, files in (("val", [val]), ("train", train)):
        expected = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in files])
        assert np.array_equal(folder.stream(split).window(0, len(folder.stream(split))), expected)
    assert verify(folder.path) == []
    assert manifest.complete
    text = folder.tokenizer.decode(folder.shards("train")[1].document(3)[1:])
    assert folder.shards("train")[1].documents["hash"][3] == xxhash.xxh3_64_intdigest(text.encode())
    few = prepare(*train, **given, tokens__max_tokens=1, home="steps")
    assert len(Manifest.read(few).parts) == 2  # the validation, which does not count, and what was asked for
    grown = prepare(*train, **given, tokens__workers=2, home="steps")
    assert tree(grown) == tree(folder.path)


def test_without_val_files_the_hash_decides(prepare: Prepare, llmc: list[Path]) -> None:
    folder = TokenFolder(prepare(*llmc, tokens__val_fraction=0.2))
    assert verify(folder.path) == []
    total = sum(ShardHeader.unpack(path.read_bytes()[:1024], "").tokens for path in llmc)
    assert folder.manifest.tokens("train") + folder.manifest.tokens("val") == total
    assert 0.1 < folder.manifest.tokens("val") / total < 0.3


def test_dedup_of_tokens(prepare: Prepare, llmc: list[Path]) -> None:
    twice = llmc[0].with_name("again.bin")
    twice.write_bytes(llmc[1].read_bytes())
    folder = prepare(llmc[1], twice, tokens__dedup=True, tokens__val_fraction=0.0)
    counts = Manifest.read(folder).counts
    assert counts.dropped == {"duplicate": counts.rows // 2}
    (shard,) = TokenFolder(folder).shards("train")  # of the other file nothing is left, and it has no shard
    assert shard.header.documents == counts.rows // 2
    assert verify(folder) == []


def test_a_text_corpus_may_have_its_own_validation(prepare: Prepare, tmp_path: Path, texts: list[str]) -> None:
    for name, rows in (("mine", texts[:50]), ("rest", texts[50:150])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    folder = TokenFolder(prepare(tmp_path / "rest.jsonl", corpus__val_files=[str(tmp_path / "mine.jsonl")]))
    assert sum(shard.documents.size for shard in folder.shards("val")) == 50
    assert sum(shard.documents.size for shard in folder.shards("train")) == 100
    assert verify(folder.path) == []


def test_a_file_larger_than_a_shard_is_cut_between_documents(
    prepare: Prepare, llmc: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prepare import parts

    monkeypatch.setattr(parts, "MAX_FILE_BYTES", 10_000)
    folder = TokenFolder(prepare(llmc[1], tokens__part_tokens=3_000, tokens__val_fraction=0.0))
    assert len(folder.manifest.parts) > 3
    stream = folder.stream("train")
    assert np.array_equal(stream.window(0, len(stream)), np.fromfile(llmc[1], "<u2", offset=1024))
    assert all(shard.tokens[0] == EOT for shard in folder.shards("train")[1:] if shard.header.tokens)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tokens__tokenizer": "bpe", "tokens__vocab_size": 512}, "and there is tokens.tokenizer=bpe"),
        ({"corpus__filters": ["len(text) > 1"]}, "or corpus.filters"),
    ],
)
def test_what_tokens_cannot_have(prepare: Prepare, llmc: list[Path], setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(llmc[1], **setting)


def test_an_id_that_is_not_in_the_vocabulary(prepare: Prepare, tmp_path: Path) -> None:
    np.array([1, 2, 60000, 3], "<u2").tofile(tmp_path / "a.bin")
    with complains(CorruptError, "60000"):
        prepare(tmp_path / "a.bin")


def test_every_oracle_comes_back_bit_for_bit(prepare: Prepare, shared: Path, tmp_path: Path) -> None:
    """What llm.c, nanoGPT and Megatron wrote: prepared, then exported in the same form."""
    oracles = shared / "oracles"
    for form, train, val, settings in (
        ("nanogpt", "nanogpt_shakespeare_train.bin", "nanogpt_shakespeare_val.bin", {}),
        (
            "megatron",
            "megatron_meg-gpt2-openwebtext_text_document.bin",
            "",
            {"tokens__tokenizer": str(oracles / "megatron_gpt2-tiny-vocab.json"), "tokens__val_fraction": 0.0},
        ),
        ("", "llmc_tiny_shakespeare_train.bin", "llmc_tiny_shakespeare_val.bin", {}),
    ):
        given = {"corpus__val_files": [str(oracles / val)]} if val else {}
        folder = TokenFolder(prepare(oracles / train, **given, **settings, home=train))
        assert verify(folder.path) == []
        for split, name in (("train", train), ("val", val)):
            if form and name:
                for path in export(folder, split, form, tmp_path / form):
                    assert path.read_bytes() == (oracles / name).with_suffix(path.suffix).read_bytes(), path
            elif name:
                shard = max(folder.shards(split), key=lambda shard: shard.header.tokens)
                ours, theirs = shard.path.read_bytes(), (oracles / name).read_bytes()
                assert ours[:12] == theirs[:12] and ours[1024:] == theirs[1024:]
