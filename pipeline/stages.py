"""The stages of preparing, each of which can be run alone: fetch -> tokenize -> verify.

A stage takes what the one before it returns, so the order is in the arguments. Finished work is recognised by its
receipt (for tokens, by the manifest) and reported in one line; unfinished work resumes.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline import checks, drift, mixture
from pipeline.config import Recipe
from pipeline.home import folders, receipt
from pipeline.home.layout import Layout, RunPaths
from pipeline.terminal import Terminal
from shards.atomic import discard, locked, make_folder, sha256_of, sweep
from shards.errors import ConfigError, DiskError, RefusedError
from shards.fingerprint import fingerprint
from shards.manifest import MANIFEST, Manifest
from shards.numbers import count, plural, size
from train.machine.gpus import read_driver

if TYPE_CHECKING:  # pyarrow and torch are loaded by the stage that needs them
    from prepare.corpus.corpus import Corpus


class Pipeline:
    """The stages of one recipe under one home. `config` is what the user called the recipe."""

    def __init__(self, layout: Layout, config: str, recipe: Recipe, terminal: Terminal) -> None:
        self.layout, self.config, self.recipe, self.terminal = layout, config, recipe, terminal
        layout.require_writable()
        layout.keep_compiled()

    def require_device(self) -> None:
        """HostError, before any work, unless the recipe can be trained on the device that it names.

        torch is loaded for it only where there is NVIDIA's driver, or where a GPU is insisted on.
        """
        train = self.recipe.train
        if (train.tokens or train.steps) and (train.device == "cuda" or (train.device == "auto" and read_driver())):
            from train.machine.device import pick_device

            pick_device(train.device)

    def pin(self, *, force: bool = False) -> "Corpus":
        """The corpus's files, pinned by their hashes: local ones are there, those of the Hub are only listed."""
        from prepare.corpus import pin

        if named := self.recipe.tokens.folder or ", ".join(self.recipe.tokens.mix):
            field = "tokens.folder" if self.recipe.tokens.folder else "tokens.mix"
            raise ConfigError(
                f"{field} is {named}: there is nothing to fetch or to tokenize",
                "prepare, verify and train use what is there as it is",
                f"leave {field} out",
            )
        checks.require_preparable(self.layout, self.recipe)
        wanted = pin.resolve(self.recipe.corpus)
        raw, path = self.layout.raw(wanted.name), self.layout.receipt("fetch", wanted.name)
        began = time.perf_counter()
        with self.locked(f"raw-{wanted.name}", path):
            sweep(raw)
            max_tokens, note = self.recipe.tokens.max_tokens, self.terminal.note
            corpus = pin.pin(
                self.recipe.corpus, raw, locks=self.layout.locks, max_tokens=max_tokens, force=force, note=note
            )
            print_ = fingerprint({"record": corpus.record, "sources": corpus.sources})
            done = receipt.read(path, print_) is not None and not force
            seconds = time.perf_counter() - began
            if not done:
                receipt.write(path, "fetch", print_, {"files": len(corpus.sources)}, seconds)
        files = plural(len(corpus.sources), "file")
        what = f"{wanted.name}  {files}, {size(sum(source.nbytes for source in corpus.sources))}"
        name = "pin" if wanted.kind == "hub" else "fetch"  # of the Hub's files, only a list is here
        self.terminal.stage(name, what if done else f"{what}, {seconds:.1f} s", done=done)
        return corpus

    def fetch(self, corpus: "Corpus") -> None:
        """Fetch what `max_tokens` will need and is not here: all of it, or as many files as should hold so much."""
        try:
            for i in range(corpus.needed):
                corpus.path(i)
        finally:
            corpus.close()

    def tokenize(self, corpus: "Corpus", *, force: bool = False, run: RunPaths | None = None) -> Path:
        """The corpus's token folder, holding at least `max_tokens`. RefusedError when `run` was started on another."""
        from pipeline.token_recipe import TokenRecipe, engine_of, holds
        from prepare import estimate
        from prepare.build import tokenize

        tokens, wanted = self.recipe.tokens, TokenRecipe(self.layout, self.recipe, corpus)
        folder = self.layout.token_folder(corpus.record.name, wanted.fingerprint)
        if run:
            drift.refuse_other_tokens(self.layout, run, folder.name, corpus)
        path = self.layout.receipt("tokenize", folder.name)
        with self.locked(folder.name, path):
            sweep(folder.parent, folder.name)
            if force and folder.exists():
                discard(folder)
            manifest = wanted.published(folder)
            if manifest and not (folder / ".parts").exists() and holds(manifest, tokens.max_tokens):
                counts = msgspec.to_builtins(manifest.counts)
                known = receipt.read(path, wanted.fingerprint)
                if known is None or known.result != counts:  # a kill came before it was written
                    receipt.write(path, "tokenize", wanted.fingerprint, counts, 0.0)
                self.terminal.stage("tokenize", f"{folder.name}  {_amount(manifest)}", done=True)
                return folder
            began = time.perf_counter()
            done = manifest.parts if manifest else []
            if not done and not (folder / ".parts").exists():
                wanted.look()
            expected = wanted.expect(folder, done, footers=False)
            if shutil.disk_usage(self.layout.home).free < estimate.AMPLE * expected.peak:
                expected = wanted.expect(folder, done, footers=True)
            estimate.require_space(expected, self.layout.home)
            try:
                manifest = manifest or wanted.blank(make_folder(folder), self.terminal.note)
                spec = wanted.spec(folder, manifest, engine_of(tokens, self.terminal.note))
                with self.terminal.tokens(expected.tokens) as advance:
                    workers = tokens.workers or cores()
                    manifest = tokenize(spec, corpus, tokens.max_tokens, workers, advance, executor=tokens.executor)
            except DiskError as error:
                free = shutil.disk_usage(self.layout.home).free
                what = f"{error.what}; in all this needs about {expected.peak:,} bytes and {free:,} are free"
                raise DiskError(what, error.why, error.fix) from error
            finally:
                corpus.close()
                _forget_unbegun(folder)
            seconds = time.perf_counter() - began
            counts = msgspec.to_builtins(manifest.counts)
            receipt.write(path, "tokenize", wanted.fingerprint, counts, seconds)
            rate = count((manifest.tokens("train") + manifest.tokens("val")) / seconds)
            self.terminal.stage("tokenize", f"{folder.name}  {_amount(manifest)}, {seconds:.1f} s, {rate} tok/s")
            _report_losses(self.terminal, manifest)
        return folder

    def verify(self, folder: Path) -> None:
        """Every byte of the token folder compared with its manifest, once for each manifest."""
        path = self.layout.receipt("verify", folder.name)
        with self.locked(folder.name, path):
            print_ = sha256_of(folder / MANIFEST)
            done = receipt.read(path, print_) is not None
            began = time.perf_counter()
            is_named = mixture.named_folders(self.layout, self.recipe.tokens)
            fix = f"copy or pull {folder.name} again" if is_named else f"millpond tokenize {self.config} --force"
            folders.require_valid(self.layout, folder, fix, full=not done)  # sizes and headers cost nothing
            manifest = Manifest.read(folder)
            nbytes = sum(shard.nbytes for part in manifest.parts for shard in part.shards)
            if not done:
                counts = {"parts": len(manifest.parts), "bytes": nbytes}
                receipt.write(path, "verify", print_, counts, time.perf_counter() - began)
        what = "" if done else f"  {size(nbytes)}, every byte as it was written"
        self.terminal.stage("verify", folder.name + what, done=done)

    def prepared(self) -> list[Path]:
        """The recipe's token folders, which must be there: nothing is fetched or tokenized."""
        from pipeline.token_recipe import TokenRecipe
        from prepare.corpus import pin

        if named := mixture.named_folders(self.layout, self.recipe.tokens):
            return list(named)
        corpus = pin.resolve(self.recipe.corpus)
        if pin.is_pinned(corpus, self.layout.raw(corpus.name)):
            token_recipe = TokenRecipe(self.layout, self.recipe, self.pin())
            folder = self.layout.token_folder(corpus.name, token_recipe.fingerprint)
            if token_recipe.published(folder):
                return [folder]
        raise RefusedError(
            f"{self.config}: its token folder is not prepared yet",
            "there is nothing to verify",
            f"millpond prepare {self.config}",
        )

    def prepare(self, *, run: RunPaths | None = None) -> dict[Path, float]:
        """fetch, tokenize, verify; or the token folders that the recipe names, verified. Each with its weight.

        RefusedError, before anything is tokenized, when `run` was started on other tokens.
        """
        checks.require_preparable(self.layout, self.recipe)
        weights = mixture.named_folders(self.layout, self.recipe.tokens)
        if odd := mixture.misfit(weights):
            self.terminal.note(odd)
        for folder in weights:
            amount = mixture.share(weights, folder) + _amount(Manifest.read(folder))
            self.terminal.stage("tokenize", f"{folder.name}  {amount}", done=True)
        weights = weights or {self.tokenize(self.pin(), run=run): 1.0}
        for folder in weights:
            self.verify(folder)
        return weights

    @contextmanager
    def locked(self, target: str, receipt_path: Path, *, wait: bool = True) -> Iterator[None]:
        """One process at a time works on `target` and its receipt, and begins by sweeping what a killed one left of it.

        Only order rests on the lock: every file is published whole regardless.
        """

        def when_held() -> None:
            if not wait:
                raise RefusedError(
                    f"{target.replace('-', ' ', 1)}: another process is working on it",
                    "two would overwrite each other's checkpoints",
                    "wait for it, or millpond train with another --name",
                )
            self.terminal.note(f"another process is working on {target}; waiting for it")

        path = self.layout.lock(target)
        make_folder(path.parent)
        with locked(path, when_held):
            sweep(receipt_path.parent, receipt_path.name)
            yield


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_unbegun(folder: Path) -> None:
    """Remove what a prepare left that failed before it had sealed anything."""
    begun = any(path.name != "plan" for path in (folder / ".parts").glob("[!.]*"))
    if folder.exists() and not (folder / MANIFEST).exists() and not begun:
        discard(folder)


def _amount(manifest: Manifest) -> str:
    tokens = manifest.tokens("train") + manifest.tokens("val")
    return f"{count(tokens)} tokens, {plural(len(manifest.parts), 'part')}"


def _report_losses(terminal: Terminal, manifest: Manifest) -> None:
    counts = manifest.counts
    said = [f"rows dropped ({reason}): {count:,}" for reason, count in counts.dropped.items()]
    if not manifest.tokens("val"):
        said.append("no document is validation, and a run needs some: see corpus.val_files")
    if counts.repaired:
        said.append(f"{plural(counts.repaired, 'document')} had invalid Unicode, which is repaired")
    if counts.literal_eot:
        said.append(f"a literal end-of-text string, encoded as text, is in {plural(counts.literal_eot, 'document')}")
    for line in said:
        terminal.note(line)
