"""verify finds what is wrong, all of it, and says nothing of a whole folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import states

from shards import ShardWriter, verify
from shards.manifest import Manifest
from shards.split import is_val


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / tiny_folder.name))


def test_a_whole_folder(folder: Path) -> None:
    assert verify(folder) == []
    assert verify(folder, full=False) == []


def test_every_flipped_bit_is_found(folder: Path) -> None:
    random = np.random.default_rng(0)
    files = sorted(folder / name for name, _ in Manifest.read(folder).files() if (folder / name).stat().st_size)
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        at = int(random.integers(len(data)))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1 :])
        findings = verify(folder)
        assert [finding.file for finding in findings] == [path.name], (path, at)
        assert "sha256 is" in findings[0].what
        path.write_bytes(data)


def test_all_findings_come_in_one_run(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    (folder / "val-00001.docs.npy").write_bytes(b"")
    findings = verify(folder)
    assert [finding.file for finding in findings] == ["train-00000.bin", "val-00001.docs.npy"]
    assert "No such file" in findings[0].what


def rewrite(folder: Path, starts: list[int], hashes: list[int], tokens: list[int]) -> None:
    """Replace part 0's training shard by another that is consistent in itself and with the manifest."""
    import msgspec

    manifest = Manifest.read(folder)
    with ShardWriter(
        folder / "train-00000.bin", vocab_size=512, eot=511, placement="before", fingerprint=manifest.fingerprint
    ) as shard:
        shard.append(np.array(tokens, np.uint16), np.array(starts), np.array(hashes, np.uint64))
        record = shard.seal()
    parts = [msgspec.structs.replace(manifest.parts[0], train=record), *manifest.parts[1:]]
    msgspec.structs.replace(manifest, parts=parts).write(folder)


def test_documents_that_do_not_begin_with_end_of_text(folder: Path) -> None:
    rewrite(folder, [0, 2], [2**63, 2**63], [511, 5, 6, 511])
    (finding,) = verify(folder)
    states(finding.what, "2 end-of-text", "2 documents")


def test_a_validation_document_among_the_training_ones(folder: Path) -> None:
    rewrite(folder, [0, 2], [2**63, 7], [511, 5, 511, 6])
    assert [finding.what for finding in verify(folder)] == ["1 documents are in the wrong split"]


def test_the_split_looks_at_the_hash_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    half, all_of_them = is_val(hashes, 0.005, None), is_val(hashes, 0.01, None)
    assert abs(half.mean() - 0.005) < 0.0005
    assert np.all(all_of_them[half])  # a larger fraction only adds
    assert not is_val(hashes, 0.0, None).any()
