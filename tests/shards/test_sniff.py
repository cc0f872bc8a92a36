"""What a file really is, by its first bytes."""

import io
import tarfile

import pytest

from shards.sniff import HEAD_BYTES, nature_of


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"version https://git-lfs.github.com/spec/v1\r\noid sha256:" + b"0" * 64 + b"\r\nsize 1\r\n", "pointer"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n", "pointer"),
        (b"\xef\xbb\xbf\r\n<HTML lang=en>", "html"),
        (b"<!-- saved -->\n<!doctype HTML>", "html"),
        (b"<Error><Code>NoSuchKey</Code>", "error"),
        (tar(), "tar"),
        (b"PK\x05\x06" + b"\0" * 18, "zip"),
        (b"BZh9\x17rE8P\x90\0\0\0\0", "bzip2"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        ("漢字".encode("utf-16"), "utf-16"),
        ("twenty plain letters".encode("utf-16-be"), "utf-16"),
        (b"PAR1\x15\x04", "parquet"),
    ],
)
def test_what_is_known(head: bytes, name: str) -> None:
    found = nature_of(head[:HEAD_BYTES])
    assert found is not None and found.name == name and found.what and found.fix


@pytest.mark.parametrize("head", [b"", b"a", b"<html5> is a tag", b"{", b"\0" * 64, b"PAR1 text", "ÿþ".encode()])
def test_what_is_not(head: bytes) -> None:
    assert nature_of(head) is None
