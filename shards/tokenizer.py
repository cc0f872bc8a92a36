"""The tokenizer that lies in every token folder, so that shards can be read without knowing a name or a network.

`tokenizer.tiktoken` (one `base64 rank` a line) is the truth; `tokenizer.json` says the same to Hugging Face's readers.
The end-of-text id follows the last rank and is in neither file: its text in a document is ordinary text.
"""

import hashlib
import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError, from_os_error

if TYPE_CHECKING:
    import tiktoken

EOT_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class Tokenizer:
    """A byte-level BPE that splits text with GPT-2's pattern. `tokens[i]` is the bytes of id i, `eot` the last id."""

    def __init__(self, name: str, tokens: list[bytes]) -> None:
        self.name = name
        self.tokens = tokens
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1

    @classmethod
    def load(cls, path: Path, name: str, sha256: str) -> Self:
        """Read a ranks file; CorruptError unless its sha256 is the expected one."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise from_os_error(error, path, "read") from error
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise CorruptError(
                f"{path}: sha256 is {found}, expected {sha256}",
                "with another tokenizer every token means something else",
                "copy the file again from where it came",
            )
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {a2b_base64(token): int(rank) for token, rank in pairs}
        tokens = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise CorruptError(f"{path}: the ranks are not 0 to {len(tokens) - 1}, each once")
        return cls(name, tokens)

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The same tokenizer as tiktoken's: the definition of right, and the slow engine."""
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={EOT_TEXT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a literal end-of-text string in it is ordinary text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, U+FFFD for bytes that are not UTF-8; end-of-text is written out."""
        eot = EOT_TEXT.encode()
        return b"".join(eot if i == self.eot else self.tokens[i] for i in ids).decode("utf-8", "replace")

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocab_size,) the bytes of text each id stands for: what bits per byte divides by. End-of-text counts 0."""
        return np.array([*map(len, self.tokens), 0], dtype=np.int64)

    def to_tiktoken(self) -> bytes:
        """The bytes of a tiktoken ranks file."""
        return b"".join(b"%s %d\n" % (b2a_base64(token, newline=False), rank) for rank, token in enumerate(self.tokens))

    def to_json(self) -> bytes:
        """The bytes of a Hugging Face tokenizer.json that gives the same ids."""
        characters = byte_characters()

        def spell(token: bytes) -> str:
            return "".join(characters[byte] for byte in token)

        byte_level: dict[str, Any] = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {**byte_level, "add_prefix_space": False},
                "post_processor": None,
                "decoder": {**byte_level, "add_prefix_space": True},
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": None,
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": False,
                    "byte_fallback": False,
                    "ignore_merges": False,
                    "vocab": {spell(token): rank for rank, token in enumerate(self.tokens)},
                    # as one string, not as a pair: fastokens starts in 0.29 s instead of 0.45 (Nov 2026)
                    "merges": [f"{spell(left)} {spell(right)}" for left, right in self._merges()],
                },
            },
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()

    def _merges(self) -> Iterable[tuple[bytes, bytes]]:
        """The pair that each longer token was merged from: what BPE leaves of it when its own rank is not yet known."""
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        for rank, token in enumerate(self.tokens):
            if len(token) == 1:
                continue
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
                best = min(pairs)
                if best >= rank:
                    raise CorruptError(f"tokenizer {self.name}: id {rank} ({token!r}) cannot be reached by merges")
                i = pairs.index(best)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            yield parts[0], parts[1]


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
