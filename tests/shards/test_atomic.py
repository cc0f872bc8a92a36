"""A file is whole or absent, whatever happens while it is written."""

import errno
import os
from pathlib import Path

import pytest
from harness import complains, files_no_longer_than

from shards import CorruptError, DiskError, HostError
from shards.atomic import AtomicFile, make_folder, publish_bytes, published_folder, read_whole, sha256_of, sweep


def test_publish_replaces_the_whole_file(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a", b"long before")
    publish_bytes(tmp_path / "a", b"now")
    assert (tmp_path / "a").read_bytes() == b"now"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), AtomicFile(tmp_path / "a") as out:
        out.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), published_folder(tmp_path / "b") as temp:
        (temp / "half").write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with published_folder(tmp_path / "step") as temp:
            (temp / "file").write_bytes(content)
    assert (tmp_path / "step" / "file").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with files_no_longer_than(4096), pytest.raises(DiskError, match="nothing half-written was published"):
        publish_bytes(tmp_path / "a", bytes(100_000))
    assert not list(tmp_path.iterdir())


def test_the_order_of_a_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data first, then the name, then the folder: any other order can lose the file in a power cut."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def traced_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name[:2]}")
        fsync(descriptor)

    def traced_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    publish_bytes(tmp_path / "a", b"x")
    assert calls == ["fsync .a", "rename", f"fsync {tmp_path.name[:2]}"]


def test_sweep_takes_only_what_was_temporary(tmp_path: Path) -> None:
    (tmp_path / ".a.1f-12345678.tmp").write_bytes(b"left by a killed writer")
    (tmp_path / ".step.1f-12345678.tmp").mkdir()
    (tmp_path / "kept").write_bytes(b"")
    (tmp_path / ".parts").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts", "kept"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(HostError, match="Read-only file system"):
        make_folder(tmp_path / "a" / "b")


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever, and /dev/zero says that it is empty."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        for read in (sha256_of, lambda path: read_whole(path, 100)):
            with pytest.raises(CorruptError, match="is not a regular file"):
                read(path)


def test_a_file_larger_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_whole(path, 100) == bytes(100)
    with complains(CorruptError, "100 bytes", "99"):
        read_whole(path, 99)
    (tmp_path / "link").symlink_to(path)
    assert read_whole(tmp_path / "link", 100) == bytes(100)
    with pytest.raises(CorruptError, match="links are not followed"):
        read_whole(tmp_path / "link", 100, follow_links=False)
