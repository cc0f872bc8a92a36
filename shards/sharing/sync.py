"""Token folders that travel: pushed and pulled by URL, each resumable, each byte compared with the manifest.

The data goes first and the manifest last, on either side, so that half a folder is never taken for one.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shards.atomic import locked, make_folder, nearest_existing, publish_bytes, publish_file, sha256_of, sweep
from shards.errors import ConfigError, CorruptError, DiskError, NetworkError, RefusedError, from_os_error
from shards.header import HEADER_BYTES, MAX_FILE_BYTES, token_bytes
from shards.manifest import MANIFEST, MAX_BYTES, Manifest, decode, folder_name
from shards.reader import TokenFolder
from shards.sharing import storage as storages
from shards.sharing.card import CARD, card
from shards.sharing.retry import Note
from shards.sharing.storage import Storage, open_storage
from shards.verify import verify
from shards.writer import DOCS_DTYPE

_SHARD = re.compile(r"(train|val)-\d{5,}\.(bin|docs\.npy)", re.ASCII)
PULL = ".pull"  # the folder of what is half pulled
THREADS = 4
WRONG_TRIES = 3
_README_BYTES = 1 << 20
_TOKENIZER_BYTES = 256 << 20
_NPY_HEADER_BYTES = 4096  # more than any that numpy writes for one record type


def push(folder: Path, url: str, note: Note) -> None:
    """Send the token folder `folder` to `url`: hf://datasets/OWNER/NAME[@revision][/folder], what fsspec knows, a path.

    What is complete there is not sent again; further parts are added to what is there. A dataset that the Hub does not
    have is made, a private one. A README.md there that somebody wrote is kept. CorruptError when a file is not what the
    manifest says, RefusedError when another token folder is there, NetworkError when the other side does not take it.
    """
    for finding in verify(folder, full=False):
        raise CorruptError(
            f"{folder / finding.file}: {finding.what}", "a damaged folder is not shared", f"millpond verify {folder}"
        )
    manifest = Manifest.read(folder)
    storage = open_storage(url, note, create=True)
    there = _manifest_at(storage)
    if there is not None:
        _check_same(there, manifest, storage.url)
        if _extent(there) > _extent(manifest):
            note(f"{storage.url} has {len(there.parts)} parts, this folder {len(manifest.parts)}: nothing to send")
            return
    for name, _ in manifest.files():
        if not _nbytes(folder / name):
            raise CorruptError(
                f"{folder / name}: no such file", "a folder with a gap is not shared", f"millpond verify {folder}"
            )
    # Sidecars before their shards: so a shard that is there says that its sidecar is, too.
    files = sorted(manifest.files(), key=lambda file: file[0].endswith(".bin"))
    todo = [(folder / name, sha256) for name, sha256 in files if not storage.holds(folder / name, sha256)]
    closing = [*_card_for(storage, folder, manifest, there, note), (MANIFEST, (folder / MANIFEST).read_bytes())]
    if there == manifest and not todo and len(closing) == 1:
        note(f"{storage.url}: already complete")
        return
    for path, sha256 in todo:
        found = sha256_of(path)
        if found != sha256:
            raise CorruptError(
                f"{path}: sha256 is {found}, the manifest says {sha256}",
                "a damaged folder is not shared; nothing was sent",
                f"millpond verify {folder}",
            )
    done = len(files) - len(todo)

    def sent(path: Path) -> None:
        nonlocal done
        done += 1
        if _is_said(path.name):
            note(f"{path.name}  {path.stat().st_size:,} bytes  {done} of {len(files)} files")

    storage.send(todo, sent)
    if (meanwhile := _manifest_at(storage)) is not None:
        _check_same(meanwhile, manifest, storage.url)
    storage.publish(closing)
    note(f"{storage.url}: complete, {len(todo)} of {len(files)} files were sent")


def pull(url: str, folder: Path, note: Note, *, parts: int | None = None) -> Manifest:
    """Fetch the token folder at `url`, or its first `parts` parts, to `folder`; returns what is then there.

    The same call resumes after a kill, repairs what was damaged and adds the parts that are new there. Nothing outside
    `folder` is written. NetworkError when the other side does not deliver, CorruptError when that is damaged or
    impossible, DiskError before the first shard when the disk is too small, RefusedError when something else is there.
    """
    storage = open_storage(url, note)
    whole = _needed_manifest(storage)
    wanted = _first_parts(whole, parts, storage.url)
    _check_possible(wanted, storage.url)
    here = _manifest_here(folder, wanted)
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = dict(zip((name for name, _ in wanted.files()), pool.map(storage.size, _names(wanted)), strict=True))
        _check_sizes(wanted, sizes, storage.url)
        expected = {name: (size, sha256) for name, sha256 in wanted.files() if (size := sizes[name]) is not None}
        lies_here = pool.map(lambda name: _is_whole(folder / name, *expected[name]), expected)
        missing = [name for name, found in zip(expected, lies_here, strict=True) if not found]
    final = here if here is not None and _extent(here) >= _extent(wanted) else wanted  # never less than was here
    if final == here and not missing:
        shutil.rmtree(folder / PULL, ignore_errors=True)
        first = "" if wanted.parts == final.parts else f"the first {len(wanted.parts)} of "
        note(f"{folder}: already complete, {first}{len(final.parts)} parts")
        return final
    work = folder / PULL
    halves = {name: work / f"{name}.{expected[name][1][:12]}.part" for name in missing}
    _check_disk(folder, sum(expected[name][0] - _nbytes(halves[name]) for name in missing))
    with _working(folder, work):
        for stale in set(work.glob("*.part")) - set(halves.values()):
            stale.unlink()
        _fetch_all(storage, folder, {name: (halves[name], *expected[name]) for name in missing}, note)
        for name, data in _card_from(storage, folder, final, whole, here):
            publish_bytes(folder / name, data)
        final.write(folder)
        shutil.rmtree(work, ignore_errors=True)
    TokenFolder(folder)
    note(f"{folder}: complete, {len(final.parts)} parts, {final.tokens('train') + final.tokens('val'):,} tokens")
    return final


def look(url: str) -> Manifest:
    """The manifest of the token folder at `url`."""
    return _needed_manifest(open_storage(url))


def _is_said(name: str) -> bool:
    """Whether a person wants to read that this file has arrived: the large ones are enough."""
    return name.startswith("train-") and name.endswith(".bin")


def _extent(manifest: Manifest) -> tuple[int, bool]:
    """How far a folder has grown."""
    return len(manifest.parts), manifest.complete


def _names(manifest: Manifest) -> list[str]:
    return [name for name, _ in manifest.files()]


def _manifest_at(storage: Storage) -> Manifest | None:
    """The manifest on the other side, None when there is none; CorruptError when it is not one."""
    size = storage.size(MANIFEST)
    if size is None:
        return None
    if size > MAX_BYTES:
        raise CorruptError(f"{storage.url}/{MANIFEST}: {size:,} bytes, a manifest has at most {MAX_BYTES:,}")
    return decode(storage.read(MANIFEST, 0, size), Manifest, Path(storage.url) / MANIFEST)


def _needed_manifest(storage: Storage) -> Manifest:
    found = _manifest_at(storage)
    if found is None:
        raise ConfigError(
            f"{storage.url}/{MANIFEST}: no such file",
            "this is not a token folder, or its push has not finished",
            "check the address and, for a private dataset, HF_TOKEN",
        )
    return found


def _manifest_here(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest that is in `folder` already; RefusedError when anything but a beginning of `wanted` is there."""
    if (folder / MANIFEST).exists():
        here = Manifest.read(folder)
        _check_same(here, wanted, str(folder))
        return here
    known = {name for name, _ in wanted.files()} | {CARD}
    strays = [path.name for path in folder.glob("[!.]*") if path.name not in known and not _SHARD.fullmatch(path.name)]
    if strays and not (folder / PULL).is_dir():  # its own files without a manifest are what is left of it
        raise RefusedError(
            f"{folder}: has files in it, and is not a token folder: {min(strays)}",
            "they would be mixed with the shards",
            "name a folder that is empty or not there yet",
        )
    return None


def _check_same(there: Manifest, ours: Manifest, where: str) -> None:
    """RefusedError unless both are the same token folder, as far as both go."""
    if there.fingerprint != ours.fingerprint:
        raise RefusedError(
            f"{where}: holds {there.corpus.name} with fingerprint {there.fingerprint[:8]}, not {ours.fingerprint[:8]}",
            "two token folders do not mix",
            "choose another place",
        )
    for i, (theirs, mine) in enumerate(zip(there.parts, ours.parts, strict=False)):
        if theirs != mine:
            raise RefusedError(
                f"{where}: part {i} differs, though the fingerprint {there.fingerprint[:8]} is the same",
                "one of the two was made by a faulty machine or changed afterwards",
                "millpond verify FOLDER on the machine that made it, or choose another place",
            )


def _first_parts(manifest: Manifest, parts: int | None, where: str) -> Manifest:
    """The manifest of the first `parts` parts."""
    if parts is None or parts == len(manifest.parts):
        return manifest
    if not 0 < parts < len(manifest.parts):
        raise ConfigError(f"{where}: {parts} parts were asked for, it has {len(manifest.parts)}")
    return msgspec.structs.replace(manifest, parts=manifest.parts[:parts])


def _check_possible(manifest: Manifest, where: str) -> None:
    """CorruptError when a shard's counts contradict each other, before anything is made as large as they say."""
    width = token_bytes(manifest.tokenizer.vocab_size)
    for part in manifest.parts:
        for shard in part.shards:
            nbytes = HEADER_BYTES + shard.tokens * width
            if shard.nbytes != nbytes or nbytes > MAX_FILE_BYTES or shard.documents > shard.tokens:
                raise CorruptError(
                    f"{where}/{MANIFEST}: {shard.file} cannot have {shard.nbytes:,} bytes, {shard.tokens:,} tokens "
                    f"and {shard.documents:,} documents",
                    "the manifest is damaged or forged; nothing was fetched",
                )


def _check_sizes(manifest: Manifest, sizes: dict[str, int | None], where: str) -> None:
    """The first file that is not there, or not as large as the manifest says, as an error."""
    allowed = {name: (1, _TOKENIZER_BYTES) for name in sizes}
    for part in manifest.parts:
        for shard in part.shards:
            allowed[shard.file] = (shard.nbytes, shard.nbytes)
            least = shard.documents * DOCS_DTYPE.itemsize
            allowed[shard.sidecar] = (least, least + _NPY_HEADER_BYTES)
    for name, (least, most) in allowed.items():
        size = sizes[name]
        if size is None:
            raise NetworkError(
                f"{where}/{name}: no such file, and the manifest names it", "nothing was fetched", "push it again"
            )
        if not least <= size <= most:
            expected = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            raise CorruptError(
                f"{where}/{name}: {size:,} bytes, the manifest says {expected}",
                "it is damaged there; nothing was fetched",
                "remove it there and push it again from where it was made",
            )


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise DiskError(
            f"{folder}: {needed:,} bytes are needed, {free:,} are free",
            "nothing was fetched",
            "free some space, choose another disk, or pull only the first parts",
        )


@contextmanager
def _working(folder: Path, work: Path) -> Iterator[None]:
    """The folder of half pulled files, held by this process alone."""
    if work.is_symlink():
        raise CorruptError(f"{work}: is a link, and links are not followed in a token folder")

    def when_held() -> None:
        raise RefusedError(f"{folder}: another process is pulling into it", "", "wait for it")

    with locked(make_folder(work) / "lock", when_held):
        for name in (MANIFEST, CARD):
            sweep(folder, name)
        yield


def _fetch_all(storage: Storage, folder: Path, files: dict[str, tuple[Path, int, str]], note: Note) -> None:
    """Fetch several files at a time; the first failure ends the others at their next chunk, which they keep."""
    with ThreadPoolExecutor(THREADS) as pool:
        running = {pool.submit(_fetch, storage, folder / name, *file): name for name, file in files.items()}
        try:
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                name = running[future]
                if _is_said(name):
                    note(f"{name}  {files[name][1]:,} bytes  {done} of {len(files)} files")
        except BaseException:
            storage.stop.set()
            for future in running:
                future.cancel()
            raise


def _fetch(storage: Storage, path: Path, half: Path, nbytes: int, sha256: str) -> None:
    """The file at `path`, right to the byte, by way of `half`."""
    found: list[str] = []
    for _ in range(WRONG_TRIES):
        found.append(_rest(storage, path.name, half, nbytes))
        if found[-1] == sha256:
            publish_file(half, path)
            return
        half.unlink()
    same = len(set(found)) == 1
    kind, cause = (CorruptError, "it is damaged there") if same else (NetworkError, "it changes on the way")
    raise kind(
        f"{storage.url}/{path.name}: {WRONG_TRIES} times the wrong bytes: got sha256 {found[-1]}, expected {sha256}",
        f"{cause}; wrong bytes never become tokens",
        "remove it there and push it again from where it was made"
        if same
        else "look for a proxy or a failing disk, then run again",
    )


def _rest(storage: Storage, name: str, half: Path, nbytes: int) -> str:
    """Append what is missing of the file to `half`, and return the sha256 of the whole."""
    hasher = hashlib.sha256()
    try:
        descriptor = os.open(half, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            if os.fstat(descriptor).st_size > nbytes:
                file.truncate(0)
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
            while (at := file.tell()) < nbytes:
                chunk = storage.read(name, at, min(storages.CHUNK, nbytes - at))
                hasher.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
    except OSError as error:
        raise from_os_error(error, half, "written") from error
    return hasher.hexdigest()


def _is_whole(path: Path, nbytes: int, sha256: str) -> bool:
    return _nbytes(path) == nbytes and sha256_of(path) == sha256


def _nbytes(path: Path) -> int:
    """The size of the file itself, 0 when it is not there or is a link."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _our_card(manifest: Manifest) -> bytes:
    return card(manifest, folder_name(manifest.corpus.name, manifest.fingerprint)).encode()


def _readme_at(storage: Storage) -> bytes | None:
    size = storage.size(CARD)
    return None if size is None or size > _README_BYTES else storage.read(CARD, 0, size)


def _card_for(
    storage: Storage, folder: Path, manifest: Manifest, there: Manifest | None, note: Note
) -> list[tuple[str, bytes]]:
    """The README.md to send, none when the one there is the same or somebody's own words."""
    own = folder / CARD
    data = own.read_bytes() if _nbytes(own) else _our_card(manifest)
    size = storage.size(CARD)
    if size is None:
        return [(CARD, data)]
    lies_there = _readme_at(storage)
    if lies_there == data:
        return []
    if there is not None and lies_there == _our_card(there):
        return [(CARD, data)]
    note(f"{storage.url}/{CARD} differs and is kept: change it there")
    return []


def _card_from(
    storage: Storage, folder: Path, final: Manifest, whole: Manifest, here: Manifest | None
) -> list[tuple[str, bytes]]:
    """The README.md to write: the one there if it speaks of the same parts; none over somebody's own words."""
    own = folder / CARD
    if own.exists() and not (here is not None and own.read_bytes() == _our_card(here)):
        return []
    data = _readme_at(storage) if final == whole else None
    return [(CARD, data if data is not None else _our_card(final))]
