"""The stages, each of which can be run alone: fetch -> tokenize -> verify -> train -> evaluate.

A stage takes what the one before it returns, so the order is in the arguments. Finished work is recognised by its
receipt (for tokens, by the manifest) and said in one line; unfinished work goes on where it stopped.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from filelock import FileLock, Timeout

from pipeline import config, receipt
from pipeline.config import Recipe
from pipeline.fingerprint import Difference, differences, fingerprint, identity
from pipeline.layout import Layout, RunPaths
from pipeline.terminal import Terminal
from shards.atomic import make_folder, publish_bytes, sha256_of
from shards.errors import ConfigError, CorruptError, RefusedError
from shards.manifest import MANIFEST, Manifest, decode, encode
from shards.verify import verify as find_damage

if TYPE_CHECKING:  # pyarrow and torch are loaded by the stage that needs them
    from prepare.corpora import Corpus
    from train.loop import Job

MAX_NAME = 60


class Pinned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """tokens.json of a run: the token folder and how many of its parts the run sees, whatever it grows to."""

    folder: str
    fingerprint: str
    parts: int


class Pipeline:
    """The stages of one recipe under one home."""

    def __init__(self, layout: Layout, recipe: Recipe, terminal: Terminal) -> None:
        self.layout, self.recipe, self.terminal = layout, recipe, terminal
        layout.require_writable()

    def fetch(self, *, force: bool = False) -> "Corpus":
        """The corpus's files, on disk, hashed and pinned."""
        from prepare import corpora

        wanted = corpora.resolve(self.recipe.corpus)
        began = time.perf_counter()
        with self._locked(f"raw-{wanted.name}"):
            corpus = corpora.fetch(self.recipe.corpus, self.layout.raw(wanted.name), force=force)
        megabytes = sum(source.nbytes for source in corpus.sources) / 1e6
        path = self.layout.receipt("fetch", wanted.name)
        print_ = fingerprint({"record": corpus.record, "sources": corpus.sources})
        what = f"{len(corpus.sources)} files, {megabytes:,.1f} MB"
        if receipt.read(path, print_):
            self.terminal.stage("fetch", f"{wanted.name}: {what}", done=True)
        else:
            receipt.write(path, "fetch", print_, {"files": len(corpus.sources)}, time.perf_counter() - began)
            self.terminal.stage("fetch", f"{wanted.name}: {what} in {time.perf_counter() - began:.1f} s")
        return corpus

    def tokenize(self, corpus: "Corpus", *, force: bool = False) -> Path:
        """The corpus's token folder, holding at least `max_tokens`."""
        from prepare import parts, vocabulary
        from prepare.build import Job, tokenize

        tokens = self.recipe.tokens
        print_ = self._tokens_fingerprint(corpus)
        folder = self.layout.token_folder(corpus.record.name, print_)
        with self._locked(folder.name):
            if force and folder.exists():
                shutil.rmtree(folder)
            manifest = _manifest(folder, print_)
            if manifest and not (folder / ".parts").exists() and _holds(manifest, tokens.max_tokens):
                self.terminal.stage("tokenize", f"{folder.name}: {_amount(manifest)}", done=True)
                return folder
            began = time.perf_counter()
            planned = parts.plan(corpus.paths, corpus.record.text_column, tokens.part_tokens)
            if not planned:
                raise ConfigError(f"corpus {corpus.record.name}: no rows in its files", "", "name other files")
            make_folder(folder)
            if manifest is None:
                if tokens.tokenizer == "gpt2":
                    tokenizer = vocabulary.gpt2()
                else:
                    self.terminal.note(f"training a byte-pair vocabulary of {tokens.vocab_size:,}")
                    tokenizer = vocabulary.train_bpe(parts.read_all(planned, corpus.record.text_column), tokens.vocab_size)
                manifest = Manifest(
                    format="millpond-tokens-1",
                    fingerprint=print_,
                    corpus=corpus.record,
                    sources=corpus.sources,
                    tokenizer=vocabulary.save(tokenizer, folder),
                    placement=tokens.eot,
                    val_fraction=tokens.val_fraction,
                    part_tokens=tokens.part_tokens,
                    complete=False,
                    parts=[],
                )
            job = Job(folder=folder, manifest=manifest, engine=self._engine())
            estimate = sum(part.estimated_tokens for part in planned)
            with self.terminal.tokens(min(estimate, tokens.max_tokens or estimate)) as advance:
                manifest = tokenize(job, planned, tokens.max_tokens, tokens.workers or cores(), advance)
            seconds = time.perf_counter() - began
            counts = msgspec.to_builtins(manifest.counts)
            receipt.write(self.layout.receipt("tokenize", folder.name), "tokenize", print_, counts, seconds)
            rate = (manifest.tokens("train") + manifest.tokens("val")) / 1e6 / seconds
            self.terminal.stage("tokenize", f"{folder.name}: {_amount(manifest)} in {seconds:.1f} s, {rate:.1f} Mtok/s")
            _report_losses(self.terminal, manifest)
        return folder

    def verify(self, folder: Path, *, force: bool = False) -> None:
        """Every byte of the token folder compared with its manifest, once for each manifest."""
        path = self.layout.receipt("verify", folder.name)
        print_ = sha256_of(folder / MANIFEST)
        if receipt.read(path, print_) and not force:
            self.terminal.stage("verify", folder.name, done=True)
            return
        began = time.perf_counter()
        findings = find_damage(folder)
        if findings:
            raise CorruptError(
                f"{folder}: {len(findings)} things are wrong\n"
                + "\n".join(f"  {finding.file}: {finding.what}" for finding in findings[:20]),
                "a run on damaged tokens learns from what nobody wrote",
                "millpond tokenize --force",
            )
        manifest = Manifest.read(folder)
        nbytes = sum(shard.nbytes for part in manifest.parts for shard in (part.train, part.val))
        seconds = time.perf_counter() - began
        receipt.write(path, "verify", print_, {"parts": len(manifest.parts), "bytes": nbytes}, seconds)
        self.terminal.stage("verify", f"{folder.name}: {nbytes / 1e6:,.1f} MB of shards, every byte as written")

    def prepare(self) -> Path:
        """fetch, tokenize, verify."""
        folder = self.tokenize(self.fetch())
        self.verify(folder)
        return folder

    def train(self, folder: Path, name: str, *, fresh: bool = False) -> None:
        """Train the run `name`, or go on with it, or say that it is done."""
        run = self._run(name)
        wanted = self._run_identity(folder)
        print_ = fingerprint(wanted)
        with self._locked(f"run-{name}", wait=False):
            if fresh and run.root.exists():
                self.terminal.note(f"the run before is kept as {_set_aside(run.root)}")
            if run.recipe.exists():
                self._refuse_drift(run, wanted)
            if found := receipt.read(run.receipt, print_):
                loss = found.result["val_loss"]
                self.terminal.stage("train", f"{name}: {found.result['steps']:,} steps, validation {loss:.4f}", done=True)
                return
            if not run.recipe.exists():
                make_folder(run.root)
                manifest = Manifest.read(folder)
                pinned = Pinned(folder=folder.name, fingerprint=manifest.fingerprint, parts=len(manifest.parts))
                publish_bytes(run.tokens, encode(pinned))
                config.save(self.recipe, run.recipe)
            from train.loop import Trainer

            began = time.perf_counter()
            result = Trainer(self.job(run), self.terminal.training).run()
            numbers = {
                "steps": result.steps,
                "tokens": result.tokens,
                "val_loss": result.evaluation.loss,
                "val_bpb": result.evaluation.bpb,
                "weights_sha256": result.weights_sha256,
            }
            receipt.write(run.receipt, "train", print_, numbers, time.perf_counter() - began)
            self.terminal.finished(name, run, numbers)

    def job(self, run: RunPaths) -> "Job":
        """What the trainer needs to know of a run, as it was pinned when the run began."""
        from train.loop import Job

        pinned = read_pinned(run)
        return Job(
            model=self.recipe.model,
            optim=self.recipe.optim,
            train=self.recipe.train,
            folder=self.layout.tokens / pinned.folder,
            parts=pinned.parts,
            checkpoints=run.checkpoints,
            metrics=run.metrics,
            samples=run.samples,
        )

    def evaluate(self, name: str, tokens: int) -> dict[str, Any]:
        """The newest checkpoint's loss on the first `tokens` of validation (0: all), as written to evaluation.json."""
        from shards.reader import TokenFolder
        from train.device import autocast, fitting_micro_batch, pick_device, resolve_precision
        from train.evaluate import evaluate
        from train.trained import load_trained

        run = existing_run(self.layout, name)
        job = self.job(run)
        folder = TokenFolder(job.folder, parts=job.parts)
        trained = load_trained(job.checkpoints, job.model, folder)
        began = time.perf_counter()
        device = pick_device()
        precision = resolve_precision(job.train, device)
        stream = folder.stream("val")
        batch = fitting_micro_batch(
            16, trained.model.parameter_count(), job.model, folder.tokenizer.vocab_size, device, precision
        )
        found = evaluate(
            trained.model,
            stream,
            folder.tokenizer.byte_lengths,
            tokens or len(stream),
            batch,
            lambda: autocast(device, precision),
        )
        result: dict[str, Any] = {
            "run": name,
            "step": trained.step,
            "token_folder": job.folder.name,
            "seq_len": job.model.seq_len,
            "val_tokens": found.tokens,
            "val_loss": found.loss,
            "val_bpb": found.bpb,
        }
        receipt.write(run.evaluation, "evaluate", fingerprint(result), result, time.perf_counter() - began)
        return result

    def sample(self, name: str, prompt: str, tokens: int, temperature: float, seed: int) -> str:
        """Text from the newest checkpoint."""
        from shards.reader import TokenFolder
        from train.sample import generate
        from train.trained import load_trained

        job = self.job(existing_run(self.layout, name))
        folder = TokenFolder(job.folder, parts=job.parts)
        trained = load_trained(job.checkpoints, job.model, folder)
        return generate(trained.model, folder.tokenizer, prompt, tokens, temperature=temperature, seed=seed)

    def _engine(self) -> str:
        from prepare.encode import has_fastokens

        if self.recipe.tokens.engine == "fastokens" and not has_fastokens():
            self.terminal.note("fastokens is not installed here: tiktoken does it, the same ids about ten times slower")
            return "tiktoken"
        return self.recipe.tokens.engine

    def _tokens_fingerprint(self, corpus: "Corpus") -> str:
        from prepare.vocabulary import recipe_of

        tokens = self.recipe.tokens
        return fingerprint(
            {
                "format": "millpond-tokens-1",
                "corpus": {"kind": corpus.record.kind, "text_column": corpus.record.text_column},
                "sources": corpus.sources,
                "tokenizer": recipe_of(tokens),
                "options": identity(tokens),
            }
        )

    def _run_identity(self, folder: Path) -> dict[str, Any]:
        """All that can change what the run learns. The corpus and its options are in the token folder's fingerprint."""
        recipe = self.recipe
        return {
            "token_folder": folder.name,
            "model": identity(recipe.model),
            "optim": identity(recipe.optim),
            "train": identity(recipe.train),
        }

    def _refuse_drift(self, run: RunPaths, wanted: dict[str, Any]) -> None:
        before = Pipeline(self.layout, config.load_run(run.recipe), self.terminal)
        pinned = read_pinned(run)
        found = differences(before._run_identity(self.layout.tokens / pinned.folder), wanted)
        if found:
            raise RefusedError(
                f"run {run.root.name} exists and was made with another recipe:\n" + "\n".join(map(_line, found)),
                "going on with other settings would be neither the one run nor the other",
                "--name OTHER for a new run, or --fresh to start this one over (what it has is set aside)",
            )

    def _run(self, name: str) -> RunPaths:
        allowed = name.replace("-", "").replace("_", "").replace(".", "")
        if not allowed.isascii() or not allowed.isalnum() or name.startswith(".") or len(name) > MAX_NAME:
            raise ConfigError(f"run name {name!r}: letters, digits, '.', '-' and '_' only, {MAX_NAME} at most")
        return self.layout.run(name)

    @contextmanager
    def _locked(self, target: str, *, wait: bool = True) -> Iterator[None]:
        """One process at a time works on `target`. Correctness does not rest on it: sealed files are never rewritten."""
        path = self.layout.lock(target)
        make_folder(path.parent)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise RefusedError(
                    f"{target}: another process is working on it", "two would overwrite each other's checkpoints",
                    "wait for it, or use another --name",
                ) from None
            self.terminal.note(f"another process is working on {target}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def read_pinned(run: RunPaths) -> Pinned:
    """What the run was started on."""
    return decode(run.tokens.read_bytes(), Pinned, run.tokens)


def existing_run(layout: Layout, name: str) -> RunPaths:
    """The run's paths; ConfigError that lists the runs there are when there is none of that name."""
    run = layout.run(name)
    if not run.recipe.exists():
        runs = sorted(path.parent.name for path in layout.runs.glob("*/run.toml"))
        raise ConfigError(
            f"no run {name!r} under {layout.runs}", f"there are: {', '.join(runs) or 'none yet'}", "millpond train"
        )
    return run


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _manifest(folder: Path, print_: str) -> Manifest | None:
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder)
    if manifest.fingerprint != print_:
        raise CorruptError(
            f"{folder / MANIFEST}: fingerprint {manifest.fingerprint}, the recipe's is {print_}",
            "the folder has the recipe's name and was made from something else",
            f"move {folder} away and run again",
        )
    return manifest


def _holds(manifest: Manifest, max_tokens: int) -> bool:
    tokens = manifest.tokens("train") + manifest.tokens("val")
    return manifest.complete or (max_tokens > 0 and tokens >= max_tokens)


def _amount(manifest: Manifest) -> str:
    return (
        f"{manifest.tokens('train'):,} tokens to train on, {manifest.tokens('val'):,} to validate, "
        f"{len(manifest.parts)} parts"
    )


def _report_losses(terminal: Terminal, manifest: Manifest) -> None:
    counts = manifest.counts
    dropped = [
        f"{count:,} {what}"
        for count, what in (
            (counts.null, "null rows dropped"),
            (counts.empty, "empty rows dropped"),
            (counts.repaired, "documents repaired (not valid Unicode)"),
            (counts.literal_eot, "documents hold the end-of-text string as text"),
        )
        if count
    ]
    if dropped:
        terminal.note("; ".join(dropped))


def _line(difference: Difference) -> str:
    return f"  {difference.field}: {difference.before} -> {difference.now}"


def _set_aside(root: Path) -> str:
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    root.rename(aside)
    return aside.name
