"""The tokenizers a token folder can be made with: GPT-2's own ranks, or a byte-level BPE trained on the corpus."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from prepare.config import TokensConfig, require_tokenizer
from prepare.text.documents import TextBatch
from shards.atomic import publish_bytes, sha256_of
from shards.errors import ConfigError, RefusedError
from shards.manifest import TokenizerRecord
from shards.tokenizer import GPT2_RANKS_SHA256, Tokenizer, byte_characters

OTHER_PATTERNS = {  # tiktoken's files, as tiktoken_ext/openai_public.py has their hashes
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": "p50k_base",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
TRAINING_BYTES = 10 << 20  # of text; ten times more changes a 4,096-token vocabulary by little


@cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, from the ranks that come with the code."""
    return Tokenizer.load(Path(__file__).with_name("gpt2.tiktoken"), "gpt2", GPT2_RANKS_SHA256)


def existing(config: TokensConfig) -> Tokenizer | None:
    """The tokenizer that needs no training: GPT-2's, or the one in a file; None for "bpe".

    ConfigError when there is no such tokenizer, or its file does not split text as ours do.
    """
    require_tokenizer(config)
    if config.tokenizer == "bpe":
        return None
    if config.tokenizer == "gpt2":
        return gpt2()
    path = Path(config.tokenizer).expanduser()
    if path.suffix == ".tiktoken":
        sha256 = sha256_of(path)
        if sha256 in OTHER_PATTERNS:
            raise ConfigError(
                f"{path}: is {OTHER_PATTERNS[sha256]}, which does not split text as GPT-2 does",
                "with GPT-2's pattern its ids would be different",
                "--set tokens.tokenizer=gpt2",
            )
        tokenizer = Tokenizer.load(path, "", sha256)
        return Tokenizer("gpt2" if sha256 == GPT2_RANKS_SHA256 else f"bpe-{tokenizer.vocab_size}", tokenizer.tokens)
    return Tokenizer.from_vocab(path)


def recipe_of(config: TokensConfig, tokenizer: Tokenizer | None) -> dict[str, str | int]:
    """What determines the tokenizer, for a fingerprint."""
    if tokenizer is not None:
        return {"ranks": hashlib.sha256(tokenizer.to_tiktoken()).hexdigest()}
    return {"trainer": metadata.version("tokenizers"), "text_bytes": TRAINING_BYTES}


def train_bpe(batches: Iterable[TextBatch], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids, end-of-text included, from the first 10 MiB of `batches`.

    Sennrich et al. 2016 over GPT-2's pre-tokenization. Deterministic: the same text gives the same ranks. RefusedError
    when the text is too small for so many.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    model = HuggingFaceTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.train_from_iterator(
        _limited(batches),
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if model.get_vocab_size() == 256:
        raise RefusedError(
            "there is no text to train a vocabulary on", "no pair of characters occurs twice", "add text"
        )
    if model.get_vocab_size() != vocab_size - 1:
        raise RefusedError(
            f"the text gives a vocabulary of {model.get_vocab_size() + 1}, {vocab_size} were asked for",
            "there are not enough different words to merge",
            f"add text, or --set tokens.vocab_size={model.get_vocab_size() + 1}",
        )
    spelled = sorted(model.get_vocab().items(), key=lambda item: item[1])
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return Tokenizer(f"bpe-{vocab_size}", [bytes(byte_of[character] for character in token) for token, _ in spelled])


def save(tokenizer: Tokenizer, folder: Path) -> TokenizerRecord:
    """Write the tokenizer's two files into a token folder."""
    ranks, huggingface = tokenizer.to_tiktoken(), tokenizer.to_json()
    publish_bytes(folder / "tokenizer.tiktoken", ranks)
    publish_bytes(folder / "tokenizer.json", huggingface)
    return TokenizerRecord(
        name=tokenizer.name,
        pattern="gpt2",
        vocab_size=tokenizer.vocab_size,
        eot=tokenizer.eot,
        ranks_sha256=hashlib.sha256(ranks).hexdigest(),
        json_sha256=hashlib.sha256(huggingface).hexdigest(),
    )


def _limited(batches: Iterable[TextBatch]) -> Iterator[list[str]]:
    left = TRAINING_BYTES
    for batch in batches:
        yield batch.texts
        left -= batch.counts.text_bytes
        if left <= 0:
            return
