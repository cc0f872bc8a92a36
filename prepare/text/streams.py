"""Files as streams of bytes, uncompressed as they are read.

One reader for all compressions, so that all mean the same: several members are read one after another, and what is
empty, cut short or followed by something else is an error, never less text.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, cast

import zstandard

from shards.errors import ConfigError, CorruptError
from shards.sniff import HEAD_BYTES, nature_of

_INPUT_BYTES = 32 << 10
_WINDOW_BYTES = 1 << 31  # the largest of zstd --long=31


class _Decompressor(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes) -> bytes: ...


_MAKERS: dict[str, tuple[str, Callable[[], Any]]] = {
    ".gz": ("gzip", lambda: zlib.decompressobj(31)),
    ".bz2": ("bzip2", bz2.BZ2Decompressor),
    ".xz": ("xz", lzma.LZMADecompressor),
    ".zst": ("zstd", lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()),
}
DAMAGE = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, uncompressed. ConfigError when they are no text but something known, CorruptError when a
    compressed stream is not valid and complete."""
    maker = _MAKERS.get(path.suffix, ())
    file: IO[bytes] = path.open("rb")
    try:
        refuse_stranger(path, _head(file), *maker[:1])
        if maker:
            file = cast("IO[bytes]", io.BufferedReader(_Unpacked(file, path, *maker), 1 << 20))
            refuse_stranger(path, _head(file))
    except BaseException:
        file.close()
        raise
    return file


def _head(file: IO[bytes]) -> bytes:
    return cast("io.BufferedReader[Any]", file).peek(HEAD_BYTES)[:HEAD_BYTES]


def refuse_stranger(path: Path, head: bytes | None = None, *own: str) -> None:
    """ConfigError when the file begins like a pointer, a web page or another format than its `own`; `head` is its
    beginning."""
    if head is None:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    found = nature_of(head)
    if found is not None and found.name not in own:
        raise ConfigError(f"{path}: is {found.what}, despite its name", "it holds none of the text", found.fix)


class _Unpacked(io.RawIOBase):
    """A compressed file as the bytes in it."""

    def __init__(self, file: IO[bytes], path: Path, name: str, make: Callable[[], _Decompressor]) -> None:
        self._file, self._path, self._name, self._make = file, path, name, make
        self._at = make()
        self._members = 0
        self._rest = b""  # read from the file and not yet uncompressed
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(_INPUT_BYTES)
            self._rest = b""
            if not data:
                return self._end()
            if self._at.eof:
                data = data.lstrip(b"\0") if self._members else data  # padding, as tar and dd write it
                if not data:
                    continue
                self._at = self._make()
            self._ready = memoryview(self._uncompressed(data))
            if self._at.eof:
                self._members += 1
                self._rest = self._at.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _uncompressed(self, data: bytes) -> bytes:
        try:
            return self._at.decompress(data)
        except (*DAMAGE, OSError, EOFError) as error:
            if "memory" in str(error):  # zstd's own allocation, which raises no MemoryError
                raise MemoryError(f"{self._window(data)}: {error}") from error
            where = f"after {self._members} complete streams, " if self._members else ""
            raise CorruptError(
                f"{self._path}: near byte {self._file.tell():,}: {where}no valid {self._name}: {error}",
                "text after that place would be missing from the corpus",
                "fetch or copy the file again",
            ) from error

    def _window(self, data: bytes) -> str:
        """What decompressing takes, if these are the first bytes of a zstd stream."""
        try:
            return f"its window takes {zstandard.get_frame_parameters(data).window_size:,} bytes"
        except zstandard.ZstdError:
            return "its window does not fit"

    def _end(self) -> int:
        if self._at.eof:
            return 0
        size = self._file.tell()
        said = (
            f"is 0 bytes, which is no {self._name} stream"
            if not size
            else f"ends in the middle of a {self._name} stream"
        )
        raise CorruptError(
            f"{self._path}: {said}{f', after {size:,} bytes' if size else ''}",
            "text after that place would be missing from the corpus: most often a download that did not finish",
            "fetch or copy the file again",
        )

    def close(self) -> None:
        self._file.close()
        super().close()
