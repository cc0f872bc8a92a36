"""One file over HTTP that is right to the byte or not there.

Each connection appends to a part file of its own, whose size is all the state a resume needs, also after a kill. The
whole is hashed while the parts are joined, and compared with what the pinned commit says; wrong bytes are set aside and
fetched again, a bounded number of times.
"""

import glob
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3

from shards.atomic import AtomicFile, make_folder, sha256_of
from shards.errors import NetworkError, from_os_error
from shards.sharing.hub_access import refusal, timeout_seconds
from shards.sharing.retry import PASSING, Note, Retries

WRONG_TRIES = 3  # of the whole file, when its bytes were wrong
MAX_WAIT = 300.0  # seconds; a longer Retry-After is not believed
SEGMENT = 32 << 20  # bytes for which one more connection is worth it
CONNECTIONS = 4  # at most, for one file
CHUNK = 1 << 20


class Remote(NamedTuple):
    """A file to fetch. `digest` is "sha256:…" or, for what git itself holds, "git:…" (sha1 of the blob)."""

    url: str
    size: int
    digest: str
    headers: dict[str, str]


class _Again(Exception):
    """A failure that may pass; `after` seconds if the server named a time."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def matches(path: Path, size: int, digest: str) -> bool:
    """Whether the file at `path` is there and has exactly these bytes."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    kind, _, expected = digest.partition(":")
    if kind == "sha256":
        return sha256_of(path) == expected
    hasher = _hasher(kind, size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest() == expected


def download(
    remote: Remote,
    path: Path,
    stop: threading.Event,
    note: Note = lambda _: None,
    came: Callable[[int, bool], None] = lambda nbytes, now: None,
) -> None:
    """Fetch `remote` to `path`, resuming what an earlier process left. `note` is told of long waits, `came` of
    bytes: how many, and whether they came now.

    NetworkError with the reason when the bounded tries are used up, DiskError when the disk is; CancelledError soon
    after another thread sets `stop`.
    """
    make_folder(path.parent)
    count = connections_for(remote)
    bounds = [remote.size * i // count for i in range(count + 1)]
    stem = f".{path.name}.{remote.digest.partition(':')[2][:12]}"
    parts = [path.with_name(f"{stem}.{i + 1}of{count}.part") for i in range(count)]
    found = ""
    ended = threading.Event()

    def is_over() -> bool:
        return ended.is_set() or stop.is_set()

    for _ in range(WRONG_TRIES):
        ended.clear()
        with ThreadPoolExecutor(count) as pool:
            running = [
                pool.submit(_segment, remote, part, bounds[i], bounds[i + 1], is_over, note, came)
                for i, part in enumerate(parts)
            ]
            try:
                done, _unfinished = wait(running, return_when=FIRST_EXCEPTION)
            finally:
                ended.set()  # a failure of one, or Ctrl-C, ends the others at their next chunk
        for future in done:
            future.result()
        if stop.is_set():
            raise CancelledError
        found = _join(remote, parts, path)
        if found == remote.digest:
            for part in parts:
                part.unlink()
            path.with_name(f"{stem}.wrong").unlink(missing_ok=True)
            return
        parts[0].replace(path.with_name(f"{stem}.wrong"))  # kept for whoever looks for the cause
        for part in parts[1:]:
            part.unlink()
    raise NetworkError(
        f"{remote.url}: {WRONG_TRIES} times the wrong bytes: got {found}, the pinned commit says {remote.digest}",
        "wrong bytes never become tokens; a proxy, a cache or the disk may change them on the way",
        f"look at {path.with_name(f'{stem}.wrong')}, then run the same command again",
    )


def connections_for(remote: Remote) -> int:
    """Over how many connections a file is fetched."""
    return max(1, min(CONNECTIONS, remote.size // SEGMENT))


def sweep_parts(path: Path) -> bool:
    """Remove what is left of downloads of the file at `path`; whether there was anything. The caller holds its lock."""
    left = [each for each in path.parent.glob(f".{glob.escape(path.name)}.*") if each.suffix in (".part", ".wrong")]
    for each in left:
        each.unlink(missing_ok=True)
    return bool(left)


def _join(remote: Remote, parts: list[Path], path: Path) -> str:
    """Write the parts as one file and return its digest; it is published only when that is the right one."""
    kind = remote.digest.partition(":")[0]
    hasher = _hasher(kind, remote.size)
    with AtomicFile(path) as out:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    hasher.update(chunk)
                    out.write(chunk)
        found = f"{kind}:{hasher.hexdigest()}"
        if found == remote.digest:
            out.publish()
    return found


def _segment(
    remote: Remote,
    part: Path,
    first: int,
    last: int,
    is_over: Callable[[], bool],
    note: Note,
    came: Callable[[int, bool], None],
) -> None:
    """Bytes `first` to `last` of the file into `part`, appended to what is there."""
    if part.exists() and part.stat().st_size > last - first:
        part.unlink()
    if part.exists():
        came(part.stat().st_size, False)
        if part.stat().st_size == last - first:
            return
    try:
        with part.open("ab", buffering=0) as out:
            for chunk in read_chunks(remote, first + out.tell(), last, is_over, note):
                _write_all(out.fileno(), chunk)
                came(len(chunk), True)
                if is_over():
                    return
    except OSError as error:
        raise from_os_error(error, part, "written") from error


def read_chunks(
    remote: Remote, first: int, last: int, is_over: Callable[[], bool], note: Note = lambda _: None
) -> Iterator[bytes]:
    """Bytes `first` to `last`, asked for again from where they stopped; NetworkError when that does not help.

    Ends early, between two requests, when `is_over`.
    """
    at, retries = first, Retries(remote.url, is_over, note)
    with requests.Session() as session:
        while not is_over():
            try:
                for chunk in _stream(session, remote, at, last):
                    at += len(chunk)
                    retries.progress()
                    yield chunk
                return
            except _Again as error:
                retries.wait(error, str(error), error.after)


def _stream(session: requests.Session, remote: Remote, first: int, last: int) -> Iterator[bytes]:
    """Bytes `first` to `last`, as they come. _Again for what may pass, NetworkError for what will not."""
    if first == last:
        yield b""
        return
    headers = {**remote.headers, "Range": f"bytes={first}-{last - 1}", "Accept-Encoding": "identity"}
    try:
        with session.get(remote.url, headers=headers, stream=True, timeout=timeout_seconds()) as response:
            skip = _check(response, remote, first)
            left = last - first
            while chunk := response.raw.read1(CHUNK):  # what is there: a cut must not cost what came before it
                wanted = chunk[skip : skip + left]
                skip = max(0, skip - len(chunk))
                left -= len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return
        raise _Again(f"the connection was cut {left:,} bytes before the end")
    except requests.TooManyRedirects as error:
        raise NetworkError(
            f"{remote.url}: redirected in a circle", "a proxy or a login page is in the way", "check HF_ENDPOINT"
        ) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Again(_reason(error)) from error


def _check(response: requests.Response, remote: Remote, first: int) -> int:
    """How many bytes of the answer come before `first`; an exception unless it is an answer with the file in it."""
    status = response.status_code
    if status in PASSING:
        raise _Again(f"status {status} {response.reason}", _retry_after(response))
    if status in (401, 403):
        raise refusal(
            remote.url, status, response.headers.get("X-Error-Message", ""), remote.url.partition("/resolve/")[0]
        )
    if status not in (200, 206):
        raise NetworkError(
            f"{remote.url}: status {status} {response.reason}",
            "asking again would give the same answer",
            "check corpus.repo, corpus.revision and corpus.files"
            if status == 404
            else "look at the address in a browser",
        )
    if "text/html" in response.headers.get("Content-Type", ""):
        raise _Again("a web page came instead of the file: a login page or a proxy answers in the Hub's place")
    if status == 200:
        length = response.headers.get("Content-Length")
        if length is not None and length.strip() != str(remote.size):
            raise _Again(f"{length} bytes are offered, the listing says {remote.size}")
        return first
    found = response.headers.get("Content-Range", "")
    if not found.startswith(f"bytes {first}-") or not found.endswith(f"/{remote.size}"):
        raise _Again(f"asked for bytes from {first} of {remote.size}, the answer is {found!r}")
    return 0


def _retry_after(response: requests.Response) -> float | None:
    """The seconds a 429 or 503 asks to wait, from Retry-After or the Hub's own ratelimit header."""
    text = response.headers.get("Retry-After", "")
    for field in response.headers.get("RateLimit", "").split(";"):
        if field.startswith("t="):
            text = text or field[2:]
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), MAX_WAIT)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "no byte came before the time-out"
    if isinstance(error, requests.ConnectionError) and "refused" in str(error):
        return "the connection was refused"
    return f"the connection broke: {type(error).__name__}"


def _hasher(kind: str, size: int) -> "hashlib._Hash":
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.sha256()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
