"""The token folder that a recipe describes: what determines it, and how it begins."""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import assert_never

from msgspec import UNSET

from pipeline.config import Recipe
from pipeline.home import folders
from pipeline.home.layout import Layout
from prepare import estimate, parts
from prepare.config import TokensConfig
from prepare.corpus.corpus import Corpus
from prepare.corpus.download import Remote
from prepare.corpus.remote_file import RemoteFile
from prepare.part_builder import FolderSpec
from prepare.text import filters, rows
from prepare.tokens import vocabulary
from prepare.tokens.encode import EngineName, has_fastokens
from shards.atomic import make_folder, publish_bytes
from shards.errors import ConfigError, CorruptError
from shards.fingerprint import fingerprint, identity
from shards.header import token_bytes
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.manifest import MANIFEST, CutRecord, Manifest, PartRecord, decode, encode
from shards.sharing.retry import Note
from shards.tokenizer import Tokenizer

FOOTERS = 8  # of files that are not here, looked at before the first is fetched; each takes two requests


class TokenRecipe:
    """The [corpus] and [tokens] tables of a recipe, and the corpus they name.

    `tokenizer` is None until a vocabulary is trained.
    """

    def __init__(self, layout: Layout, recipe: Recipe, corpus: Corpus) -> None:
        self.corpus, self.tokens, self.filters = corpus, recipe.tokens, filters.parse_filters(recipe.corpus.filters)
        self._layout, self._keep_raw = layout, recipe.corpus.keep_raw
        self.tokenizer = vocabulary.existing(self.tokens)
        named = [(layout.tokens / name, Path(name).expanduser()) for name in self.tokens.forbid]
        self._forbid = tuple((ours if ours.exists() else path).absolute() for ours, path in named)
        forbidden = filters.forbidden_hashes(self._forbid)
        self._forbidden = filters.digest_of(forbidden) if self._forbid else None
        self._are_tokens = any(source.name.endswith(TOKEN_SUFFIXES) for source in corpus.sources)
        if self._are_tokens and (self.tokenizer is None or self.filters):
            raise ConfigError(
                "the corpus is tokens, not text, and there is tokens.tokenizer=bpe or corpus.filters",
                "a vocabulary is trained, and rows are filtered, on text",
                "name the tokenizer that made them (gpt2, or a file) and no filters",
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that determines the folder."""
        return self._fingerprint({"plan": 2} if self._is_cut_anew else {})

    @cached_property
    def _is_cut_anew(self) -> bool:
        """Whether parts are files joined and cut by a sample of the text.

        Not where an earlier version made the folder, or a run of this home was started on it: that one is grown, or
        made again, as it was cut.
        """
        if not parts.joins_or_cuts(self.corpus.sources, self.tokens.part_tokens):
            return False
        before = self._layout.token_folder(self.corpus.record.name, self._fingerprint({}))
        is_there = (before / MANIFEST).exists() or (before / ".parts").exists()
        return not is_there and before.name not in folders.users(self._layout, strict=False)

    def _fingerprint(self, more: dict[str, int]) -> str:
        record, tokens = self.corpus.record, self.tokens
        return fingerprint(
            {
                "format": "millpond-tokens-1",
                "corpus": {"kind": record.kind, "text_column": record.text_column},
                "filters": [filter.text for filter in self.filters],
                "sources": self.corpus.sources,
                "tokenizer": vocabulary.recipe_of(tokens, self.tokenizer),
                "options": {**identity(tokens), "tokenizer": self.tokenizer is None},
                "forbidden": self._forbidden,
                **more,
            }
        )

    def published(self, folder: Path) -> Manifest | None:
        """The manifest of `folder`, if there is one. CorruptError when it was made from something else."""
        if not (folder / MANIFEST).exists():
            return None
        manifest = Manifest.read(folder)
        if manifest.fingerprint != self.fingerprint:
            raise CorruptError(
                f"{folder / MANIFEST}: fingerprint {manifest.fingerprint}, the recipe's is {self.fingerprint}",
                "the folder has the recipe's name and was made from something else",
                f"move {folder} away and run again",
            )
        return manifest

    def blank(self, folder: Path, note: Note) -> Manifest:
        """The manifest that the folder begins with, its tokenizer made and saved there; `folder` exists."""
        tokens = self.tokens
        tokenizer = self.tokenizer or self._train(note)
        cut = self._cut(folder, tokenizer) if self._is_cut_anew else UNSET
        blank = Manifest(
            fingerprint=self.fingerprint,
            corpus=self.corpus.record,
            sources=self.corpus.sources,
            tokenizer=vocabulary.save(tokenizer, folder),
            placement=None if self._are_tokens else tokens.eot,
            val_fraction=tokens.val_fraction,
            filters=[filter.text for filter in self.filters],
            dedup=tokens.dedup,
            forbidden=self._forbidden,
            part_tokens=tokens.part_tokens,
            plan=cut,
            parts=[],
        )
        blank.encoded(folder)  # before the work, that it can be read
        return blank

    def _cut(self, folder: Path, tokenizer: Tokenizer) -> CutRecord:
        """How the corpus is cut; kept beside the sealed parts, whose files may be gone when the next process asks."""
        path = make_folder(folder / ".parts") / "plan"
        if path.exists():
            return decode(path.read_bytes(), CutRecord, path)
        cut = parts.cut_by_sample(self.corpus, tokenizer, self.filters)
        publish_bytes(path, encode(cut))
        return cut

    def look(self) -> None:
        """ConfigError for a column that a file does not have, before any is read or fetched.

        Of those that are to be fetched, by the footers of the first few that are parquet.
        """
        columns = [
            self.corpus.record.text_column,
            *(each.column for each in self.filters if each.column != filters.LENGTH),
        ]
        if self._are_tokens:
            return
        remote: list[tuple[str, Remote]] = []
        for i, source in enumerate(self.corpus.sources):
            place = self.corpus.glance(i) if source.has_parts else None
            if isinstance(place, Path):
                rows.look(place, columns)
            elif place and source.name.endswith(".parquet") and i < self.corpus.needed:
                remote.append((source.name, place))
        with ThreadPoolExecutor(FOOTERS) as pool:
            list(pool.map(lambda one: rows.open_parquet(Path(one[0]), columns, RemoteFile(one[1])), remote[:FOOTERS]))

    def expect(
        self, folder: Path, done: list[PartRecord], *, footers: bool, scale: int = parts.ENGLISH
    ) -> estimate.Estimate:
        """What it takes until `folder`, with the parts `done`, holds what is asked for."""
        wanted = estimate.Target(
            folder=folder,
            done=done,
            part_tokens=self.tokens.part_tokens,
            max_tokens=self.tokens.max_tokens,
            width=token_bytes(self.tokenizer.vocab_size if self.tokenizer else self.tokens.vocab_size),
            keep_raw=self._keep_raw,
            scale=scale,
        )
        return estimate.estimate(self.corpus, wanted, footers=footers)

    def spec(self, folder: Path, manifest: Manifest, engine: EngineName) -> FolderSpec:
        """What building its parts needs to know."""
        return FolderSpec(folder=folder, manifest=manifest, engine=engine, forbid=self._forbid)

    def _train(self, note: Note) -> Tokenizer:
        note(f"training a byte-pair vocabulary of {self.tokens.vocab_size:,}")
        texts = parts.read_all(self.corpus, self.tokens.part_tokens, self.filters)
        return vocabulary.train_bpe(texts, self.tokens.vocab_size)


def engine_of(tokens: TokensConfig, note: Note) -> EngineName:
    """What encodes on this machine: tiktoken, after a note, where the fast engine is not installed."""
    match tokens.engine:
        case "tiktoken":
            return "tiktoken"
        case "fastokens":
            if has_fastokens():
                return "fastokens"
            note("fastokens is not installed here: tiktoken gives the same ids, about ten times slower")
            return "tiktoken"
        case _:
            assert_never(tokens.engine)


def holds(manifest: Manifest, max_tokens: int) -> bool:
    """Whether the folder has as many tokens as are asked for, or all that there are."""
    return manifest.complete or 0 < max_tokens <= sum(map(manifest.counted, manifest.parts))
