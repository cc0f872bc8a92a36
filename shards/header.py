"""The 1,024 bytes in front of every shard's tokens. FORMAT.md is the specification; a test decodes its hex dump.

Words 0-2 are llm.c's, so llm.c and its kin read our shards as they are; they ignore the words behind.
"""

import struct
from typing import Literal, Self

import msgspec
import numpy as np

from shards.errors import CorruptError

HEADER_BYTES = 1024
MAX_FILE_BYTES = 2**31 - 1
Placement = Literal["before", "after"]

_FORMS = {2: (20240520, 1), 4: (20240801, 7)}  # bytes a token: llm.c's magic and version (GPT-2's and Llama 3's)
MAGICS = frozenset(magic.to_bytes(4, "little") for magic, _ in _FORMS.values())
_TAG = int.from_bytes(b"MPND", "little")
_REVISION = 1
_PLACEMENTS: tuple[Placement, ...] = ("before", "after")  # written as 1 and 2; 0 is "unknown"
_LAYOUT = struct.Struct("<3i 6i i Q 32s")
_REFETCH = "copy the file again from where it came, or millpond tokenize CONFIG --force"


def token_bytes(vocab_size: int) -> int:
    """The bytes of one token id of such a vocabulary: 2 up to 65,536 ids, else 4."""
    return 2 if vocab_size <= 2**16 else 4


class ShardHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard says of itself.

    A file written by llm.c has only `tokens` and `token_bytes`: everything else is zero, empty or None.
    `xxh3` is the xxh3-64 of the token bytes; `max_id` the largest token id in them, -1 when there are none.
    """

    tokens: int
    token_bytes: int = 2
    documents: int = 0
    vocab_size: int = 0
    eot: int = 0
    placement: Placement | None = None
    max_id: int = -1
    xxh3: int = 0
    fingerprint: str = ""

    @property
    def native(self) -> bool:
        """Whether millpond wrote the file, so that every field is known."""
        return bool(self.fingerprint)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The little-endian type of one token."""
        return np.dtype(f"<u{self.token_bytes}")

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return HEADER_BYTES + self.tokens * self.token_bytes

    def pack(self) -> bytes:
        """The header as 1,024 bytes."""
        magic, version = _FORMS[self.token_bytes]
        placement = 1 + _PLACEMENTS.index(self.placement) if self.placement else 0
        return _LAYOUT.pack(
            *(magic, version, self.tokens),
            *(_TAG, _REVISION, self.vocab_size, self.eot, placement, self.documents),
            *(self.max_id, self.xxh3, bytes.fromhex(self.fingerprint)),
        ).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, name: str) -> Self:
        """The header in the first 1,024 bytes of file `name`; CorruptError names the word that is wrong."""
        if len(data) < HEADER_BYTES:
            raise CorruptError(f"{name}: {len(data)} bytes, a shard has at least {HEADER_BYTES}", "", _REFETCH)
        magic, version, tokens, tag, revision, vocab_size, eot, placement, documents, max_id, xxh3, fingerprint = (
            _LAYOUT.unpack_from(data)
        )
        width = next((width for width, form in _FORMS.items() if form[0] == magic), None)
        if width is None:
            known = " or ".join(str(form[0]) for form in _FORMS.values())
            raise CorruptError(f"{name}: word 0 is {magic}, a shard starts with {known}", "this is not a token shard")
        if version != _FORMS[width][1]:
            raise CorruptError(f"{name}: word 1 is version {version}, expected {_FORMS[width][1]}", "", _REFETCH)
        if tokens < 0:
            raise CorruptError(f"{name}: word 2 says {tokens} tokens", "", _REFETCH)
        if tag != _TAG:
            return cls(tokens=tokens, token_bytes=width)
        if revision != _REVISION:
            raise CorruptError(
                f"{name}: word 4 is format revision {revision}, this millpond reads {_REVISION}", "", "upgrade millpond"
            )
        if (
            not 0 < vocab_size <= 256**width
            or not 0 <= eot < vocab_size
            or not 0 <= placement <= 2
            or not 0 <= documents <= tokens
            or not -1 <= max_id < vocab_size
        ):
            fields = f"vocabulary {vocab_size}, end-of-text {eot}, placement {placement}, {documents} documents"
            raise CorruptError(f"{name}: words 5-9 are not valid: {fields}, largest id {max_id}", "", _REFETCH)
        return cls(
            tokens=tokens,
            token_bytes=width,
            documents=documents,
            vocab_size=vocab_size,
            eot=eot,
            placement=_PLACEMENTS[placement - 1] if placement else None,
            max_id=max_id,
            xxh3=xxh3,
            fingerprint=fingerprint.hex(),
        )
