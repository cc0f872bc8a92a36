"""Token files as others write them, made by hand with numpy, and token folders made of them."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import Manifest, ShardWriter, TokenFolder
from shards.interop import ForeignTokens, read_tokens
from shards.manifest import CorpusRecord, Counts, PartRecord, ShardRecord, SourceRecord, TokenizerRecord

EOT = 299


def record_of(vocab_size: int) -> TokenizerRecord:
    """A tokenizer that no test of bytes looks into."""
    nothing = "0" * 64
    return TokenizerRecord(
        name="x", pattern="gpt2", vocab_size=vocab_size, eot=vocab_size - 1, ranks_sha256=nothing, json_sha256=nothing
    )


def folder_of(
    path: Path, tokenizer: TokenizerRecord, *parts: tuple[ForeignTokens, ForeignTokens | None]
) -> TokenFolder:
    """A token folder with a shard for each foreign file."""
    path.mkdir(exist_ok=True)
    placement, fingerprint = parts[0][0].placement, "ab" * 32

    def shard(name: str, found: ForeignTokens | None) -> ShardRecord:
        with ShardWriter(
            path / name,
            vocab_size=tokenizer.vocab_size,
            eot=tokenizer.eot,
            placement=placement,
            fingerprint=fingerprint,
        ) as out:
            if found:
                out.append(found.tokens, found.starts, np.full(len(found.starts), 2**63, np.uint64))
            return out.seal()

    Manifest(
        fingerprint=fingerprint,
        corpus=CorpusRecord(kind="tokens", name="foreign", text_column="", details={}),
        sources=[SourceRecord(name=f"{i}.bin", nbytes=0, digest="sha256:" + "0" * 64) for i in range(len(parts))],
        tokenizer=tokenizer,
        placement=placement,
        val_fraction=0,
        part_tokens=1 << 20,
        parts=[
            PartRecord(
                source=i,
                first=0,
                last=0,
                ends_source=True,
                counts=Counts(),
                train=shard(f"train-{i:05}.bin", train),
                val=shard(f"val-{i:05}.bin", val),
            )
            for i, (train, val) in enumerate(parts)
        ],
    ).write(path)
    return TokenFolder(path)


def megatron(path: Path, tokens: NDArray[np.generic], code: int, sizes: list[int], bounds: list[int]) -> Path:
    """Write a pair the way Megatron's IndexedDatasetBuilder does; returns the .bin."""
    starts = np.cumsum([0, *sizes])[:-1] * tokens.dtype.itemsize
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(bounds))
        + np.array(sizes, "<i4").tobytes()
        + starts.astype("<i8").tobytes()
        + np.array(bounds, "<i8").tobytes()
    )
    path.write_bytes(tokens.tobytes())
    return path


def llmc(path: Path, tokens: NDArray[np.generic]) -> Path:
    """Write a shard the way llm.c's data_common.py does."""
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(tokens)) if tokens.dtype == np.uint16 else (20240801, 7, len(tokens))
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def nanogpt(path: Path, tokens: NDArray[np.generic]) -> Path:
    path.write_bytes(tokens.tobytes())
    return path


def npy(path: Path, tokens: NDArray[np.generic]) -> Path:
    np.save(path, tokens)
    return path


def read(path: Path, vocab_size: int = EOT + 1) -> ForeignTokens:
    return read_tokens(path, eot=vocab_size - 1, vocab_size=vocab_size)


def in_every_form(folder: Path) -> dict[str, Path]:
    """The same two documents in every form."""
    tokens = np.array([EOT, 72, 105, EOT, 33], "<u2")
    return {
        "nanogpt": nanogpt(folder / "nanogpt.bin", tokens),
        "npy": npy(folder / "npy.npy", tokens),
        "llmc": llmc(folder / "llmc.bin", tokens),
        "megatron": megatron(folder / "megatron.bin", tokens, 8, [3, 2], [0, 1, 2]),
    }
