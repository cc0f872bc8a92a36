"""What is refused on its way in or out: by name, and with nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import complains, tree

from shards import CorruptError, DiskError, Manifest, NetworkError, RefusedError
from shards.sharing.sync import pull, push


@pytest.fixture
def small(tiny_folder: Path) -> Manifest:
    """The first part of the tiny folder, as it was before it grew."""
    manifest = Manifest.read(tiny_folder)
    return msgspec.structs.replace(manifest, parts=manifest.parts[:1])


def test_a_damaged_folder_is_not_pushed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "folder"))
    there = tmp_path / "there"
    data = (folder / "train-00000.bin").read_bytes()
    (folder / "train-00000.bin").write_bytes(data[:-2])
    with pytest.raises(CorruptError, match="its header says"):
        push(folder, str(there), print)
    (folder / "train-00000.bin").write_bytes(data[:-2] + b"\0\0")  # right size, right header: only the hash tells
    with complains(CorruptError, "train-00000.bin", "sha256"):
        push(folder, str(there), print)
    (folder / "train-00000.bin").write_bytes(data)
    (folder / "val-00000.docs.npy").unlink()
    with complains(CorruptError, "val-00000.docs.npy"):
        push(folder, str(there), print)
    assert not there.exists()


def test_another_token_folder_is_not_mixed_in(tiny_folder: Path, small: Manifest, tmp_path: Path) -> None:
    manifest = small
    there = tmp_path / "there"
    there.mkdir()
    msgspec.structs.replace(manifest, fingerprint="0" * 64).write(there)
    before = tree(there)
    ours = manifest.fingerprint[:8]
    with complains(RefusedError, "00000000", ours):
        push(tiny_folder, str(there), print)
    with complains(RefusedError, "00000000", ours):
        pull(str(tiny_folder), there, print)
    assert tree(there) == before
    part = msgspec.structs.replace(manifest.parts[0], first=9)
    msgspec.structs.replace(manifest, parts=[part]).write(there)
    with complains(RefusedError, "part 0"):
        push(tiny_folder, str(there), print)
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").write_text("mine")
    with pytest.raises(RefusedError, match="has files in it, and is not a token folder"):
        pull(str(tiny_folder), other, print)
    assert tree(other) == {"dear.txt": b"mine"}


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["parts"][0]["train"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: shard(m).update(file="../../up.bin"), "not a valid Manifest"),
        (lambda m: shard(m).update(file="/etc/passwd"), "not a valid Manifest"),
        (lambda m: shard(m).update(file=".bashrc"), "not a valid Manifest"),
        (lambda m: shard(m).update(file="val-00000.bin"), "not a valid Manifest"),
        (lambda m: shard(m).update(nbytes=2**62, tokens=2**61 - 512), r"train-00000\.bin cannot have"),
        (lambda m: shard(m).update(nbytes=shard(m)["nbytes"] + 2), r"train-00000\.bin cannot have"),
        (lambda m: shard(m).update(nbytes=0), r"train-00000\.bin has 0 bytes and"),
        (lambda m: shard(m).update(documents=2**62), r"train-00000\.bin cannot have"),
        (
            lambda m: shard(m).update(nbytes=1024, tokens=0, documents=0),
            r"train-00000\.bin: [\d,]+ bytes, the manifest",
        ),
        (
            lambda m: shard(m).update(documents=10_000),
            r"train-00000\.docs\.npy: [\d,]+ bytes, the manifest says 160,000 to 164,096",
        ),
    ],
)
def test_a_hostile_manifest(
    tiny_folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    there, here = tmp_path / "there", tmp_path / "a" / "here"
    shutil.copytree(tiny_folder, there)
    manifest = json.loads((there / "manifest.json").read_text())
    change(manifest)
    (there / "manifest.json").write_text(json.dumps(manifest))
    before = tree(tmp_path)
    with pytest.raises(CorruptError, match=message):
        pull(str(there), here, print)
    assert tree(tmp_path) == before
    assert not here.parent.exists()


def test_a_manifest_without_end_is_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(tiny_folder, tmp_path / "there"))
    with (there / "manifest.json").open("ab") as file:
        file.truncate(65 << 20)
    with complains(CorruptError, "68,157,440", "67,108,864"):
        pull(str(there), tmp_path / "here", print)


def test_a_file_that_is_missing_there(tiny_folder: Path, tmp_path: Path) -> None:
    there = Path(shutil.copytree(tiny_folder, tmp_path / "there"))
    (there / "val-00000.bin").unlink()
    with complains(NetworkError, "val-00000.bin"):
        pull(str(there), tmp_path / "here", print)
    assert not (tmp_path / "here").exists()


def test_a_link_in_the_place_of_half_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    here, outside = tmp_path / "here", tmp_path / "outside"
    outside.mkdir()
    (here / ".pull").parent.mkdir()
    (here / ".pull").symlink_to(outside)
    with pytest.raises(CorruptError, match="is a link"):
        pull(str(tiny_folder), here, print)
    assert tree(outside) == {}


def test_a_disk_that_is_too_small(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(len(data) for name, data in tree(tiny_folder).items() if name not in ("manifest.json", "README.md"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    here = tmp_path / "here"
    with complains(
        DiskError,
        f"{here}: {needed:,} bytes are needed, {needed - 1:,} are free",
        "nothing was fetched",
        "hint: free some space, choose another disk, or pull only the first parts",
    ):
        pull(str(tiny_folder), here, print)
    assert not here.exists()
