"""The tokenizer inside every token folder, so that shards can be read without knowing a name or a network.

`tokenizer.tiktoken` (one `base64 rank` a line) is the truth; `tokenizer.json` says the same to Hugging Face's readers.
The end-of-text id follows the last rank and is in neither file: its text in a document is ordinary text.
"""

import hashlib
import json
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from functools import cache, cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.atomic import read_whole
from shards.errors import ConfigError, CorruptError
from shards.manifest import TokenizerRecord, decode

if TYPE_CHECKING:
    import tiktoken

EOT_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_MAX_BYTES = 8 << 20  # twice a vocabulary of 200,000
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_OUR_FORM = "millpond's tokenizers are byte-level BPEs that split text as GPT-2's does"


class _Added(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any]
    merges: list[str | tuple[str, str]] = []
    type: str = "BPE"
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class TokenizerJson(msgspec.Struct):
    """What decides over ids in a Hugging Face tokenizer.json."""

    model: _Model
    pre_tokenizer: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None
    added_tokens: list[_Added] = []


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
        data = read_whole(path, _MAX_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise CorruptError(
                f"{path}: sha256 is {found}, expected {sha256}",
                "with another tokenizer every token means something else",
                "copy the file again from where it came",
            )
        try:
            pairs = (line.split() for line in data.splitlines() if line)
            ranks = {a2b_base64(token): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise CorruptError(f"{path}: not one base64 token and one rank a line: {error}") from error
        tokens = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise CorruptError(f"{path}: the ranks are not 0 to {len(tokens) - 1}, each once")
        if len({token for token in tokens if len(token) == 1}) != 256:
            raise CorruptError(f"{path}: not every single byte has a rank", "such text could not be encoded")
        return cls(name, tokens)

    @classmethod
    def of_folder(cls, folder: Path, record: TokenizerRecord) -> Self:
        """The tokenizer whose files are in `folder`; CorruptError unless it is the one of `record`."""
        path = folder / "tokenizer.tiktoken"
        tokenizer = cls.load(path, record.name, record.ranks_sha256)
        if (tokenizer.vocab_size, tokenizer.eot) != (record.vocab_size, record.eot):
            raise CorruptError(
                f"{path}: a vocabulary of {tokenizer.vocab_size} that ends with end-of-text {tokenizer.eot}, "
                f"expected {record.vocab_size} and {record.eot}",
                "some ids would have another meaning, or none",
                "copy the file again from where it came",
            )
        return tokenizer

    @classmethod
    def from_vocab(cls, path: Path) -> Self:
        """Read GPT-2's `vocab.json` (a token, spelled as in `byte_characters`, to its id) or Hugging Face's
        `tokenizer.json`. End-of-text may be in it, as the last id.

        A vocab.json does not say how it merges: in the order of ids, as GPT-2's and every trained byte-level BPE. The
        merges in a tokenizer.json are compared with that. CorruptError when the file is neither, ConfigError when its
        tokenizer is none of our form.
        """
        data = read_whole(path, 8 * _MAX_BYTES)
        merges = None
        if isinstance(decode(data, dict, path).get("model"), dict):
            found = decode(data, TokenizerJson, path)
            vocab, merges = _vocab_of(found, path), found.model.merges
        else:
            vocab = decode(data, dict[str, int], path)
        tokens = _spelled_out(vocab, path)
        tokenizer = cls(f"bpe-{len(tokens) + 1}", tokens)
        try:
            ours = [(_spell(left), _spell(right)) for left, right in tokenizer._merges()]
        except CorruptError as error:
            raise ConfigError(f"{path}: {error.what}", _OUR_FORM) from error
        theirs = ours if merges is None else [tuple(m.split(" ")) if isinstance(m, str) else m for m in merges]
        for i, (merge, right) in enumerate(zip_longest(theirs, ours)):
            if merge != right:
                raise ConfigError(
                    f"{path}: merge {i} is {merge}, and {right} in the order of its ids",
                    "millpond merges in that order, and would encode text to other ids than this tokenizer",
                )
        if hashlib.sha256(tokenizer.to_tiktoken()).hexdigest() == GPT2_RANKS_SHA256:
            tokenizer.name = "gpt2"
        return tokenizer

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
        """(vocab_size,) the bytes that each id decodes to: what bits per byte divides by. End-of-text counts 0."""
        return np.array([*map(len, self.tokens), 0], dtype=np.int64)

    def to_tiktoken(self) -> bytes:
        """The bytes of a tiktoken ranks file."""
        return b"".join(b"%s %d\n" % (b2a_base64(token, newline=False), rank) for rank, token in enumerate(self.tokens))

    def to_json(self) -> bytes:
        """The bytes of a Hugging Face tokenizer.json that gives the same ids."""
        return self._json

    @cached_property
    def _json(self) -> bytes:
        """Finding the 50,000 merges of GPT-2 takes about a second."""
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
                    "vocab": {_spell(token): rank for rank, token in enumerate(self.tokens)},
                    # as one string, not as a pair: fastokens starts in 0.29 s instead of 0.45 (Nov 2026)
                    "merges": [f"{_spell(left)} {_spell(right)}" for left, right in self._merges()],
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
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            while len(parts) > 2:
                best = min(pairs)
                if best >= rank:
                    raise CorruptError(f"tokenizer {self.name}: id {rank} ({token!r}) cannot be reached by merges")
                i = pairs.index(best)
                merged = self.tokens[best]
                parts[i : i + 2] = [merged]
                del pairs[i]
                if i:
                    pairs[i - 1] = ranks.get(parts[i - 1] + merged, rank)
                if i < len(pairs):
                    pairs[i] = ranks.get(merged + parts[i + 1], rank)
            yield parts[0], parts[1]


def _vocab_of(found: TokenizerJson, path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer.json, end-of-text included; ConfigError when it is no byte-level BPE like ours."""
    model, split = found.model, found.pre_tokenizer or {}
    wrong = None
    if model.type != "BPE" or isinstance(model.vocab, list):
        wrong = f"its model is {model.type}"
    elif split.get("type") != "ByteLevel" or not split.get("use_regex", True):
        wrong = f"its pre_tokenizer is {split.get('type')}, with another pattern than GPT-2's"
    elif split.get("add_prefix_space", True):
        wrong = "its pre_tokenizer adds a space before the text"
    elif found.normalizer is not None:
        wrong = f"its normalizer, {found.normalizer.get('type')}, changes text before it is encoded"
    elif model.continuing_subword_prefix or model.end_of_word_suffix:
        wrong = "its tokens are marked as parts of words"
    others = [added.content for added in found.added_tokens if added.content != EOT_TEXT]
    if others and not wrong:
        wrong = f"it has {len(others)} special tokens beside {EOT_TEXT}: {', '.join(others[:3])}"
    if wrong or isinstance(model.vocab, list):
        raise ConfigError(f"{path}: {wrong}", _OUR_FORM)
    return {**model.vocab, **{added.content: added.id for added in found.added_tokens}}


def _spelled_out(vocab: dict[str, int], path: Path) -> list[bytes]:
    """The bytes of ids 0, 1, 2 and so on, end-of-text left out; ConfigError when they cannot be a tokenizer of ours."""
    order = sorted(vocab, key=vocab.__getitem__)
    wrong = next((i for i, text in enumerate(order) if vocab[text] != i), None)
    if wrong is not None:
        text = order[wrong]
        raise ConfigError(f"{path}: {text!r} has id {vocab[text]}, expected {wrong}", "ids are 0, 1, 2 and so on")
    last = len(order) - 1
    if vocab.get(EOT_TEXT, last) != last:
        raise ConfigError(f"{path}: {EOT_TEXT} has id {vocab[EOT_TEXT]}, expected the last, {last}", _OUR_FORM)
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens: list[bytes] = []
    for i, text in enumerate(order):
        if text == EOT_TEXT:
            break
        if not text or not byte_of.keys() >= set(text):
            raise ConfigError(f"{path}: id {i}, {text!r}, is not spelled in GPT-2's characters for bytes", _OUR_FORM)
        tokens.append(bytes(byte_of[character] for character in text))
    if missing := 256 - sum(len(token) == 1 for token in tokens):
        raise ConfigError(f"{path}: {missing} of the 256 bytes have no id", f"text could not be encoded; {_OUR_FORM}")
    return tokens


def _spell(token: bytes) -> str:
    return "".join(map(byte_characters().__getitem__, token))


@cache
def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
