"""The other side of a push or a pull: a Hub dataset, whatever fsspec reaches, or a plain folder.

Every question is asked again, a bounded number of times, while its failure may pass.
"""

import hashlib
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from shards.atomic import AtomicFile, make_folder, nearest_existing, publish_bytes, sha256_of
from shards.errors import ConfigError, HostError, MillpondError, NetworkError, RefusedError
from shards.header import HEADER_BYTES
from shards.sharing.hub_access import bound_waiting, endpoint, is_offline, timeout_seconds, token
from shards.sharing.progress import Progress
from shards.sharing.retry import PASSING, Note, Retries, reason_of

T = TypeVar("T")
CHUNK = 16 << 20  # bytes asked for at once; the Hub counts requests, 3,000 in five minutes without an account
COMMIT_SECONDS = 60.0  # that the Hub may take to answer, with a commit of many files
BATCH_FILES = 50  # what the Hub advises for one commit
BATCH_BYTES = 8 << 30
_HUB_URL = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>[^@]*?))?/*"
)


class Storage:
    """A folder that fsspec reaches, at `url`. `note` is told of what takes long; setting `stop` ends waiting."""

    def __init__(self, url: str, note: Note = lambda _: None) -> None:
        import fsspec

        self.note = note
        self.url = url.rstrip("/") or url
        self.stop = threading.Event()
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise HostError(f"{url}: {error}", "", "install the package it names, then run again") from error
        except OSError as error:
            raise NetworkError(f"{url}: {reason_of(error)}", "", "check the address and the network") from error
        except Exception as error:  # every file system has kinds of its own, and no base that all share
            raise ConfigError(
                f"{url}: {reason_of(error)}", "", "give hf://datasets/OWNER/NAME, an fsspec URL or a folder"
            ) from error
        self.fs.invalidate_cache()
        local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self._folder = Path(self.root) if local else None
        if self._folder is not None:
            self.url = self.url if "://" in self.url else str(self._folder)  # where a relative name leads to
            found = nearest_existing(self._folder)
            if not found.is_dir():
                raise ConfigError(f"{found}: is not a folder", "", "name another")

    def size(self, name: str) -> int | None:
        """The bytes of file `name`, None when it is not there."""

        def ask() -> int | None:
            try:
                info = self.fs.info(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

        return self._asked(name, ask)

    def read(self, name: str, at: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes of file `name` from offset `at` on."""

        def ask() -> bytes:
            with self.fs.open(f"{self.root}/{name}", "rb", block_size=CHUNK, cache_type="none") as file:
                file.seek(at)
                data: bytes = file.read(nbytes)
            if len(data) != nbytes:
                raise OSError(f"asked for {nbytes:,} bytes from {at:,}, {len(data):,} came")
            return data

        return self._asked(name, ask)

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether the local file at `path` is there already.

        In a local folder every byte is hashed. Elsewhere a shard is known by its size and its header, which has the
        folder's fingerprint and the hash of its tokens; a sidecar, which is sent before its shard, by its size and that
        shard.
        """
        if self.size(path.name) != path.stat().st_size:
            return False
        if self._folder is not None:
            return sha256_of(self._folder / path.name) == sha256
        if path.name.endswith(".docs.npy"):
            shard = path.with_name(path.name.removesuffix(".docs.npy") + ".bin")
            return self.holds(shard, "")
        if path.suffix == ".bin":
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
            return self.read(path.name, 0, len(header)) == header
        return self.read(path.name, 0, path.stat().st_size) == path.read_bytes()

    def send(self, files: Sequence[tuple[Path, str]], sent: Callable[[Path], None]) -> None:
        """Send local files, each with its sha256, one after the other; `sent` is called with each one that is there."""
        for path, _sha256 in files:
            self._asked(path.name, lambda path=path: self._put(path))  # type: ignore[misc]
            sent(path)

    def publish(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Write small files, in this order."""
        for name, data in files:
            if self._folder is not None:
                publish_bytes(make_folder(self._folder) / name, data)
            else:
                self._asked(name, lambda name=name, data=data: self.fs.pipe_file(f"{self.root}/{name}", data))  # type: ignore[misc]

    def _put(self, path: Path) -> None:
        if self._folder is None:
            self.fs.put_file(str(path), f"{self.root}/{path.name}")
            return
        with path.open("rb") as source, AtomicFile(make_folder(self._folder) / path.name) as out:
            while chunk := source.read(1 << 20):
                out.write(chunk)
            out.publish()

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        """The answer, asked for again while the failure may pass."""
        where = f"{self.url}/{name}" if name else self.url
        retries = Retries(where, self.stop.is_set, self.note)
        while not self.stop.is_set():
            try:
                return ask()
            except MillpondError:
                raise
            except Exception as error:  # every file system has kinds of its own, and no base that all share
                status = _status(error)
                if isinstance(error, FileNotFoundError | PermissionError) or (status and status not in PASSING):
                    raise NetworkError(
                        f"{where}: {reason_of(error)}",
                        "what has arrived is kept",
                        "check the address and your permission to read it, then run the same command again",
                    ) from error
                retries.wait(error, reason_of(error))
        raise CancelledError


class HubStorage(Storage):
    """A dataset repository of the Hub, or a folder in one. What is read is pinned to one commit."""

    def __init__(self, url: str, note: Note = lambda _: None, *, create: bool = False) -> None:
        from huggingface_hub import HfApi, HfFileSystem, get_token
        from huggingface_hub.utils import logging as hub_logging
        from huggingface_hub.utils.tqdm import disable_progress_bars

        self.note = note
        match = _HUB_URL.fullmatch(url)
        if match is None or match["repo"].partition("/")[0] in ("datasets", "models", "spaces", "buckets"):
            raise ConfigError(
                f"{url}: not a dataset of the Hub", "", "give hf://datasets/OWNER/NAME[@revision][/folder]"
            )
        if is_offline():
            raise NetworkError(f"{url}: HF_HUB_OFFLINE is set", "", "unset HF_HUB_OFFLINE")
        if create and token() is None and get_token() is not None:
            # huggingface_hub 2.4 sends the user's token with a file whatever token=False says (seen by a test)
            raise RefusedError(
                f"{url}: HF_ENDPOINT is {endpoint()}, and a push would give it your token",
                "the token goes to the Hub's own hosts alone",
                "set MILLPOND_TRUST_ENDPOINT=1 if you trust that host, or log out and unset HF_TOKEN",
            )
        self.url, self.repo, self.revision = url.rstrip("/"), match["repo"], unquote(match["revision"] or "main")
        self.stop = threading.Event()
        self._folder = None
        self._prefix = f"{match['folder']}/" if match["folder"] else ""
        access: dict[str, Any] = {"endpoint": endpoint(), "token": token() or False}
        self._api = HfApi(**access)
        disable_progress_bars()  # pull and push say themselves how far they are
        hub_logging.set_verbosity(logging.ERROR)  # it warns of every upload without Xet
        bound_waiting(COMMIT_SECONDS if create else timeout_seconds())
        if create:
            self._asked("", lambda: self._api.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True))
        seconds = timeout_seconds()
        info = self._asked("", lambda: self._api.dataset_info(self.repo, revision=self.revision, timeout=seconds))
        self.fs = HfFileSystem(**access, skip_instance_cache=True)
        self.root = f"datasets/{self.repo}@{info.sha}/{self._prefix}".rstrip("/")

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether the file is there already: the Hub has the sha256, or git's hash, of all its files."""
        if self.size(path.name) != path.stat().st_size:
            return False
        info = self.fs.info(f"{self.root}/{path.name}")
        if info.get("lfs"):
            return bool(info["lfs"]["sha256"] == sha256)
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return bool(info.get("blob_id") == blob)

    def send(self, files: Sequence[tuple[Path, str]], sent: Callable[[Path], None]) -> None:
        """Send local files in commits of some fifty; what an interrupted one had sent is not sent again.

        Over plain HTTP, which every hub has: where there is no Xet, huggingface_hub would wait for it silently.
        """
        from huggingface_hub import CommitOperationAdd

        nbytes = sum(path.stat().st_size for path, _ in files)
        came = Progress(nbytes, self.note).of("sending", nbytes)
        for batch in _batches(files):
            with ExitStack() as opened:
                additions = []
                for path, sha256 in batch:
                    addition = CommitOperationAdd(self._prefix + path.name, path)
                    addition.upload_info.sha256 = bytes.fromhex(sha256)  # known, so it is not read once more for it
                    addition.path_or_fileobj = opened.enter_context(_Sent(path, came))  # not sent through Xet
                    additions.append(addition)
                self._commit(additions, f"Add {len(batch)} files of tokens")
            for path, _ in batch:
                sent(path)

    def publish(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Write small files in one commit."""
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(self._prefix + name, data) for name, data in files]
        self._commit(additions, f"Publish {' and '.join(name for name, _ in files)}")

    def _commit(self, additions: list[Any], message: str) -> None:
        self._asked(
            "",
            lambda: self._api.create_commit(
                self.repo, additions, commit_message=message, repo_type="dataset", revision=self.revision
            ),
        )


def _batches(files: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """The files of one commit after the other."""
    batch: list[tuple[Path, str]] = []
    nbytes = 0
    for path, sha256 in files:
        batch.append((path, sha256))
        nbytes += path.stat().st_size
        if len(batch) == BATCH_FILES or nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


class _Sent(io.BufferedReader):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, came: Callable[[int, bool], None]) -> None:
        super().__init__(io.FileIO(path))
        self._came = came

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.BufferedReader."""
        data = super().read(size)
        self._came(len(data), True)
        return data


def open_storage(url: str, note: Note = lambda _: None, *, create: bool = False) -> Storage:
    """The storage at `url`; with `create` a Hub dataset that is not there yet is made, a private one."""
    return HubStorage(url, note, create=create) if url.startswith("hf://") else Storage(url, note)


def _status(error: BaseException | None) -> int:
    """The HTTP status in an error or in what it came from, 0 when there is none."""
    while error is not None:
        code = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
        if isinstance(code, int):
            return code
        error = error.__cause__
    return 0
