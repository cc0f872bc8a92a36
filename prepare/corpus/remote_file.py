"""A file that is not here, read range by range, and how fast its bytes come. Only for an estimate: what is read is
not compared with the commit."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from prepare.corpus.download import Remote, connections_for, read_chunks

MEASURED_SECONDS = 5.0
MEASURED_BYTES = 16 << 20  # a connection


class RemoteFile(io.RawIOBase, IO[bytes]):
    """The file as pyarrow reads one: each read is a request. Setting `stop` ends waiting."""

    def __init__(self, remote: Remote, stop: threading.Event | None = None) -> None:
        self._remote, self._stop, self._at = remote, stop or threading.Event(), 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The offset of the next read, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.IOBase; nothing is asked."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._remote.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes from the offset on; all that is left for -1. NetworkError when they do not come."""
        last = self._remote.size if size < 0 else min(self._remote.size, self._at + size)
        chunks = read_chunks(self._remote, self._at, last, self._stop.is_set) if last > self._at else ()
        data = b"".join(chunks)
        self._at += len(data)
        return data


def transfer_rate(remote: Remote) -> float | None:
    """Bytes a second over as many connections as a download of the file has, in at most some five seconds.

    None when not a byte came in that time.
    """
    count = connections_for(remote)
    began = time.monotonic()

    def is_over() -> bool:
        return time.monotonic() > began + MEASURED_SECONDS

    def count_bytes(i: int) -> int:
        first = remote.size * i // count
        nbytes = 0
        for chunk in read_chunks(remote, first, min(remote.size, first + MEASURED_BYTES), is_over):
            nbytes += len(chunk)
            if is_over():
                break
        return nbytes

    with ThreadPoolExecutor(count) as pool:
        nbytes = sum(pool.map(count_bytes, range(count)))
    return nbytes / (time.monotonic() - began) if nbytes else None
