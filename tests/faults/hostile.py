"""Shards, sidecars, manifests and tokenizers from a stranger: damaged and forged, many times over.

    python -P tests/faults/hostile.py --count 1000000 [--seed N]

`count` headers and manifests in memory, a fiftieth as many whole folders on disk, and every forgery by hand once. What
reads them answers or raises a MillpondError. Anything else is a fault, and so is needing 200 MB more than at the start:
the limit is on address space, which also counts what numpy and mmap take.
"""

import argparse
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from prepare.config import CorpusConfig
from prepare.corpus import pin
from shards import Manifest, MillpondError, Shard, ShardHeader, ShardWriter, TokenFolder, Tokenizer, verify
from shards.manifest import CorpusRecord, Counts, PartRecord, SourceRecord, TokenizerRecord, decode, encode

MOST_BYTES = 200 << 20
SECONDS = 5  # that reading one small folder may take
PARTS = 2
WORDS = [0, 1, 2, -1, 255, 256, 257, 65_535, 65_536, 2**20, 2**31 - 1, -(2**31), 20240520, 20240801, 7]
NUMBERS = ["0", "-1", "-0.0", "1e999", "1.5", "NaN", "Infinity", str(2**62), str(2**63 - 1), str(2**64), "1" * 5000]
OTHERS = ["null", "true", "{}", "[]", "[" * 20_000, '{"a":' * 20_000, "0." + "9" * 5000]
STRINGS = [
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "train-00000.bin\\n",
    "a\\u0000b",
    "\\ud800",
    "CON",
    "x" * 5000,
    "after",
]
STRINGS += ["sha256:" + "0" * 64, "0" * 64, "0" * 16]
JSON_VALUES = [value.encode() for value in (*NUMBERS, *OTHERS, *(f'"{text}"' for text in STRINGS))]
SHAPES = ["(4611686018427387904,)", "(" + "9" * 5000 + ",)", "(-1,)", "()", "(True,)", "(1,) * 10**9", "12"]
NPY_HEADERS = [
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': __import__('os').system('touch owned'), 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('start', '<u8'), ('hash', '<u8')], 'fortran_order': True, 'shape': (12,), }",
    *(f"{{'descr': [('start', '<u8'), ('hash', '<u8')], 'fortran_order': False, 'shape': {it}, }}" for it in SHAPES),
    "{'descr': '(1000000000,)u8', 'fortran_order': False, 'shape': (1,), }",
    "(" * 5000,
    "{'descr': '\0', 'fortran_order': False, 'shape': (1,)",
    "[" * 500 + "]" * 500,
    "-" * 9000 + "1",
    "1 if 1 else '''",
]


def hostile_sidecars() -> list[bytes]:
    """Files that numpy.load has opinions about."""
    made = [b"", b"\x93", b"\x93NUMPY", b"PK\x03\x04" + b"\0" * 60, b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"\0" * 4096]
    for version in (b"\1\0", b"\2\0", b"\3\0", b"\x09\0"):
        width = 2 if version == b"\1\0" else 4
        for header in NPY_HEADERS:
            text = header.encode("latin1")
            made.append(b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text + b"\0" * 200)
        made.append(b"\x93NUMPY" + version + b"\xff" * width + b"{")
    return made


def hostile_ranks() -> list[bytes]:
    """Files that are no tokenizer."""
    first = b"AA== 0\n"
    return [
        *(b"", b"AA==\n", b"AA== 0 1\n", b"A 0\n", b"AA== x\n", b"AA== -1\n", b"AA== " + b"1" * 5000 + b"\n"),
        *(first * 2, first + b"AQ== 2\n", b"\0" * 1000, b"\xff\xfe", first.replace(b"0", "\u0663".encode())),
    ]


class Folder:
    """A small valid token folder, as bytes by file name; the tokenizer is the 256 bytes."""

    def __init__(self, scratch: Path) -> None:
        self.path = scratch / "valid"
        self.path.mkdir()
        tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)])
        (self.path / "tokenizer.tiktoken").write_bytes(tokenizer.to_tiktoken())
        (self.path / "tokenizer.json").write_bytes(b"{}")
        parts = []
        for i in range(PARTS):
            records = []
            for split, hashes in (("train", 2**63), ("val", 0)):
                path = self.path / f"{split}-{i:05}.bin"
                with ShardWriter(path, vocab_size=257, eot=256, placement="before", fingerprint="ab" * 32) as shard:
                    tokens = np.array([256, 104, 105] * 12, np.uint16)
                    starts = np.arange(0, 36, 3)
                    shard.append(tokens, starts, np.full(12, hashes + i, np.uint64))
                    records.append(shard.seal())
            counts = Counts(rows=24, text_bytes=48)
            parts.append(
                PartRecord(source=0, first=0, last=1, ends_source=True, counts=counts, train=records[0], val=records[1])
            )
        Manifest(
            fingerprint="ab" * 32,
            corpus=CorpusRecord(kind="files", name="hostile", text_column="text", details={"a": "b"}),
            sources=[SourceRecord(name="a.txt", nbytes=48, digest="sha256:" + "0" * 64)],
            tokenizer=TokenizerRecord(
                name="bytes",
                pattern="gpt2",
                vocab_size=257,
                eot=256,
                ranks_sha256=_sha256(tokenizer.to_tiktoken()),
                json_sha256=_sha256(b"{}"),
            ),
            placement="before",
            val_fraction=0.1,
            part_tokens=1000,
            parts=parts,
        ).write(self.path)
        self.files = {path.name: path.read_bytes() for path in self.path.iterdir()}
        assert read_everything(self.path), "the folder to begin with is not valid"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_everything(path: Path) -> bool:
    """Read all of a token folder, as a run and as `millpond verify` would; whether it was found whole."""
    whole = not verify(path)
    with suppress(MillpondError):
        TokenFolder(path).tokenizer.byte_lengths.sum()
    for file in sorted(path.glob("*.bin")):
        with suppress(MillpondError):
            shard = Shard(file)
            shard.header.pack()
            len(shard.documents)
            shard.check_tokens()
    folder = TokenFolder(path, verify="hash")
    for split in ("train", "val"):
        folder.stream(split)
        for shard in folder.shards(split):
            for i in range(min(shard.header.documents, 50)):
                tokens = shard.document(i)
                if whole:
                    folder.tokenizer.decode(tokens.tolist())
    return whole


def damaged(data: bytes, rng: random.Random, splices: Callable[[bytearray, random.Random], None]) -> bytes:
    """One to four changes: flips, insertions, removals, doublings, cuts, and values that are hostile by themselves."""
    raw = bytearray(data)
    for _ in range(1 + int(rng.random() * 4)):
        kind, at = rng.random(), int(rng.random() * (len(raw) or 1))
        if kind < 0.40:
            splices(raw, rng)
        elif kind < 0.65 and raw:
            raw[at] ^= 1 << int(rng.random() * 8)
        elif kind < 0.75 and raw:
            raw[at] = int(rng.random() * 256)
        elif kind < 0.82:
            raw[at:at] = rng.randbytes(1 + int(rng.random() * 8))
        elif kind < 0.89:
            del raw[at : at + 1 + int(rng.random() * 8)]
        elif kind < 0.96:
            raw[at:at] = raw[at : at + int(rng.random() * 300)]
        else:
            del raw[at:]
    return bytes(raw)


def splice_word(raw: bytearray, rng: random.Random) -> None:
    """Replace one of a header's words."""
    at = 4 * int(rng.random() * 20)
    raw[at : at + 4] = rng.choice(WORDS).to_bytes(4, "little", signed=True)


def splice_value(raw: bytearray, rng: random.Random) -> None:
    """Replace one of the values of a JSON text."""
    start = int(rng.random() * (len(raw) or 1))
    found = _VALUE.search(raw, start)
    if found:
        value = JSON_VALUES[int(rng.random() * len(JSON_VALUES))]
        raw[found.start(1) : found.end(1)] = value if len(value) < 10_000 or rng.random() < 0.05 else b"[[[["


_VALUE = re.compile(rb': ("[^"]*"|[-+.0-9eE]+|true|false)')


class Attack:
    """Counts what became of everything that was tried; a foreign exception is kept with what caused it."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.rng = random.Random(seed)
        self.scratch = scratch
        self.folder = Folder(scratch)
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def attempt(self, what: str, read: Callable[[], object]) -> None:
        """Call `read`; only an answer or a MillpondError is right."""
        try:
            read()
        except MillpondError:
            self.outcomes[f"{what} refused"] += 1
        except BaseException as error:  # also what derives from BaseException, such as a panic in a library
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.faults.append(f"{what}: {type(error).__name__}: {error} at {last.filename}:{last.lineno}"[:400])
        else:
            self.outcomes[f"{what} accepted"] += 1

    def in_memory(self, count: int) -> None:
        """`count` headers and manifests, half of each."""
        header = self.folder.files["train-00000.bin"][:1024]
        manifest = self.folder.files["manifest.json"]
        for _ in range(count // 2):
            self.attempt(
                "header", partial(_read_header, damaged(header[:100], self.rng, splice_word).ljust(1024, b"\0"))
            )
            self.attempt("manifest", partial(_read_manifest, damaged(manifest, self.rng, splice_value)))

    def on_disk(self, count: int) -> None:
        """`count` folders with one damaged file, whose hash the manifest then names in two of three."""
        folder = Path(shutil.copytree(self.folder.path, self.scratch / "damaged"))
        sidecars, ranks = hostile_sidecars(), hostile_ranks()
        for number in range(count):
            name = self.rng.choice(sorted(self.folder.files))
            data = self.folder.files[name]
            if name.endswith(".npy"):
                new = sidecars[number] if number < len(sidecars) else damaged(data, self.rng, splice_word)
            elif name.endswith(".tiktoken"):
                new = self.rng.choice(ranks) if self.rng.random() < 0.1 else damaged(data, self.rng, splice_word)
            else:
                new = damaged(data, self.rng, splice_value if name.endswith(".json") else splice_word)
            self._try_file(folder, name, new, seal=self.rng.random() < 0.67)
        for data in sidecars:
            self._try_file(folder, "train-00000.docs.npy", data, seal=True)
        for data in ranks:
            self._try_file(folder, "tokenizer.tiktoken", data, seal=True)

    def _try_file(self, folder: Path, name: str, data: bytes, *, seal: bool) -> None:
        manifest = self.folder.files["manifest.json"]
        if seal and name.endswith(".bin") and len(data) >= 1024:
            token_hash = xxhash.xxh3_64_intdigest(data[1024:])
            manifest = manifest.replace(self.folder.files[name][40:48][::-1].hex().encode(), b"%016x" % token_hash)
            data = data[:40] + token_hash.to_bytes(8, "little") + data[48:]
        if seal:
            manifest = manifest.replace(_sha256(self.folder.files[name]).encode(), _sha256(data).encode())
        (folder / "manifest.json").write_bytes(manifest)
        (folder / name).write_bytes(data)
        self.attempt(name.partition("-")[0] if name.endswith(".bin") else name[-8:], partial(read_everything, folder))
        (folder / name).write_bytes(self.folder.files[name])
        assert not Path("owned").exists()

    def locks(self, count: int) -> None:
        """`count` damaged lock.json: files are fetched by the names in it."""
        raw = self.scratch / "raw"
        raw.mkdir()
        asked = {"kind": "hub", "repo": "org/web", "revision": "main", "files": "*.parquet"}
        manifest = decode(self.folder.files["manifest.json"], Manifest, raw)
        record = msgspec.structs.replace(manifest.corpus, kind="hub", details={"repo": "org/web", "commit": "0" * 40})
        lock = {"asked": asked, "record": record, "sources": manifest.sources}
        data = msgspec.json.format(msgspec.json.encode(lock), indent=2)
        config = CorpusConfig(kind="hub", repo="org/web", files=("*.parquet",))

        def read() -> None:
            corpus = pin.pin(config, raw)
            try:
                corpus.path(0)
            finally:
                corpus.close()

        for _ in range(count):
            (raw / "lock.json").write_bytes(damaged(data, self.rng, splice_value))
            self.attempt("lock.json", read)

    def forgeries(self) -> None:
        """What is not a file at all, once in the place of each file; reading it may neither hang nor take memory."""
        for name in sorted(self.folder.files):
            for what, forge in FORGERIES.items():
                folder = Path(shutil.copytree(self.folder.path, self.scratch / f"{name}-{what}"))
                (folder / name).unlink()
                forge(folder / name)
                signal.signal(signal.SIGALRM, _too_long)
                signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
                self.attempt(f"{what} as {name}", partial(read_everything, folder))
                signal.setitimer(signal.ITIMER_REAL, 0)
                shutil.rmtree(folder)


class _TooLong(BaseException):
    """No OSError, which a reader may well catch."""


def _too_long(*_: object) -> None:
    raise _TooLong(f"still reading after {SECONDS} s")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 * MOST_BYTES)


def _link_out(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_text("not yours")
    path.symlink_to(secret)


FORGERIES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": _link_out,
    "sparse": _sparse,
}


def _read_header(data: bytes) -> None:
    header = ShardHeader.unpack(data, "a.bin")
    header.pack()
    assert header.nbytes >= 1024 and header.dtype.itemsize == header.token_bytes


def _read_manifest(data: bytes) -> None:
    manifest = decode(data, Manifest, Path("manifest.json"))
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name, _ in manifest.files())
    assert manifest.tokens("train") >= 0 and manifest.counts.rows >= 0
    encode(manifest)
    msgspec.to_builtins(manifest)


def limit_memory(more: int) -> None:
    """Let this process have `more` bytes of address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.perf_counter()
    memory = Path("/dev/shm")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a lock that is believed asks for its files
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else None) as name:
        attack = Attack(options.seed, Path(name))
        limit_memory(MOST_BYTES)
        attack.in_memory(options.count)
        attack.on_disk(options.count // 50)
        attack.locks(options.count // 1000)
        attack.forgeries()
    for what, times in sorted(attack.outcomes.items()):
        if " as " not in what:
            print(f"{times:>10,} {what}")
    print(
        f"{sum(attack.outcomes.values()):,} tried, {len(attack.faults)} faults, {time.perf_counter() - began:.0f} s, ",
        end="",
    )
    print(f"most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    for fault, times in Counter(attack.faults).most_common(20):
        print(f"FAULT ({times} times): {fault}")
    return 1 if attack.faults else 0


if __name__ == "__main__":
    sys.exit(main())
