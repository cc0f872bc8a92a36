"""Text to token ids as flat buffers, never as lists of Python ints: those alone would cap the speed.

fastokens is the fast engine, tiktoken the definition of right: a sample of the documents, chosen by content hash, is
encoded by both for as long as millpond exists, and a single different id stops the work.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError, RefusedError
from shards.tokenizer import Tokenizer

EngineName = Literal["fastokens", "tiktoken"]
SAMPLE_EVERY = 512  # documents; about 2 % of encoding time, since tiktoken takes about 12 times as long


class Encoded(NamedTuple):
    """`ids`: (tokens,) uint32, all documents end to end. `offsets`: (documents + 1,) int64; document i is
    `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.uint32]
    offsets: NDArray[np.int64]


class Engine(Protocol):
    """What turns texts into ids. Every engine gives the same ids."""

    def encode(self, texts: list[str]) -> Encoded:
        """The ids of `texts`; a literal end-of-text string is ordinary text."""


class TiktokenEngine:
    """One document at a time through tiktoken."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoding = tokenizer.encoding

    def encode(self, texts: list[str]) -> Encoded:
        """See Engine."""
        try:
            parts = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        except ValueError as error:  # about a million spaces in a row overflow its regex engine
            raise RefusedError(
                f"tiktoken cannot split one of {len(texts)} documents, of {max(map(len, texts)):,} characters: {error}",
                "it holds a run of white space that is longer than tiktoken's stack",
                "--set tokens.engine=fastokens, which can",
            ) from error
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return Encoded(np.concatenate([np.empty(0, np.uint32), *parts]), offsets)


class FastokensEngine:
    """Whole batches through fastokens, one thread: the processes of the pool are the parallelism.

    From tokenizer.json, not from the ranks: given ranks and a pattern, fastokens 0.3.5 splits text with a general regex
    engine, 49 MB a CPU-second against 165 (42 MB of English, first pass, Nov 2026). The ids are the same.
    """

    def __init__(self, folder: Path) -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read once, when the module is imported
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, texts: list[str]) -> Encoded:
        """See Engine."""
        ids, offsets = self._tokenizer.encode_batch_flat(texts)
        return Encoded(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64))


class Encoder:
    """An engine, made from the tokenizer files in `folder`, spot-checked against tiktoken, the reference."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, engine: EngineName) -> None:
        self._oracle = TiktokenEngine(tokenizer)
        self.engine: Engine
        match engine:
            case "tiktoken":
                self.engine = self._oracle
            case "fastokens":
                self.engine = FastokensEngine(folder)
            case _:
                assert_never(engine)
        self._seen_any = False

    def encode(self, texts: list[str], hashes: NDArray[np.uint64], place: str) -> Encoded:
        """The ids of `texts`. CorruptError naming `place` when the engines disagree on a sampled document."""
        encoded = self.engine.encode(texts)
        if self.engine is not self._oracle:
            sampled = np.flatnonzero(hashes % np.uint64(SAMPLE_EVERY) == 0).tolist()
            if texts and not self._seen_any:
                sampled.append(int(hashes.argmin()))  # a small corpus has its check too
                self._seen_any = True
            for i in sampled:
                self._compare(texts[i], encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]], f"{place}, row {i}")
        return encoded

    def _compare(self, text: str, ids: NDArray[np.uint32], place: str) -> None:
        try:
            right = self._oracle.encode([text]).ids
        except RefusedError:
            return  # what tiktoken cannot encode it cannot check
        if not np.array_equal(ids, right):
            n = min(len(ids), len(right))
            at = int(np.argmax(ids[:n] != right[:n])) if np.any(ids[:n] != right[:n]) else n
            raise CorruptError(
                f"{place}: the fast engine and tiktoken disagree from token {at} on: "
                f"{ids[at : at + 5].tolist()} against {right[at : at + 5].tolist()}",
                "tiktoken is right by definition; shards made with the fast engine here cannot be trusted",
                "run again with --set tokens.engine=tiktoken, and report the text to fastokens",
            )


def has_fastokens() -> bool:
    """Whether the fast engine is installed on this machine."""
    from importlib.util import find_spec

    return find_spec("fastokens") is not None
