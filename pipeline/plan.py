"""What a recipe will take, said before it begins."""

import shutil
from pathlib import Path
from typing import NamedTuple

from pipeline import checks, mixture
from pipeline.stages import Pipeline, cores
from pipeline.token_recipe import TokenRecipe, engine_of, holds
from prepare import estimate
from prepare.tokens import vocabulary
from shards.manifest import Manifest


class Plan(NamedTuple):
    """About what preparing takes. Sizes are bytes. `download_rate`, bytes a second of one file, and `rate`, tokens a
    second of all workers, are measured now, None where there is nothing to measure; `vocabulary_seconds` is what
    training the vocabulary takes.

    `done_tokens` are there already; `files`, `rows` and `tokens` are those of the finished folder.
    """

    config: str
    folder: str
    corpus: str
    tokens: int
    done_tokens: int
    free: int
    vocab_size: int
    repo: str = ""
    commit: str = ""
    source_files: int = 0
    files: int = 0
    rows: int = 0
    download: int = 0
    download_rate: float | None = None
    shards: int = 0
    peak: int = 0
    workers: int = 0
    rate: float | None = None
    vocabulary_seconds: float = 0.0


class Training(NamedTuple):
    """About what training takes: `hours`, evaluations included, from what was measured here and now.

    `measured_sequences` of random tokens in `measured_steps` whole steps; `watts` and `kwh` are the GPU's alone. They
    are None where it does not tell, and `cost` where train.kwh_price is not set. Sizes are bytes; `saves` is all
    checkpoints that are on disk at once.
    """

    device: str
    precision: str
    tokens: int
    steps: int
    batch_tokens: int
    micro_batch: int
    measured_sequences: int
    measured_steps: int
    tok_per_s: float
    mfu_percent: float
    peak_flops: float
    peak_source: str
    hours: float
    watts: float | None
    kwh: float | None
    cost: float | None
    checkpoint: int
    saves: int


def plan(pipeline: Pipeline) -> Plan:
    """Pin the corpus, read the footers it needs, and measure how fast this machine tokenizes some of it."""
    recipe = pipeline.recipe
    if given := list(mixture.named_folders(pipeline.layout, recipe.tokens)):
        return _ready(pipeline, given)
    corpus = pipeline.pin()
    wanted = TokenRecipe(pipeline.layout, recipe, corpus)
    folder = pipeline.layout.token_folder(corpus.record.name, wanted.fingerprint)
    published = wanted.published(folder)
    parts = published.parts if published else []
    texts = [] if published and holds(published, recipe.tokens.max_tokens) else estimate.sample(corpus)
    trained = None if wanted.tokenizer or published else estimate.vocabulary_of(recipe.tokens.vocab_size, texts)
    tokenizer, vocabulary_seconds = trained or (wanted.tokenizer or vocabulary.gpt2(), 0.0)
    scale = estimate.measured_scale(tokenizer, texts)
    expected = wanted.expect(folder, parts, footers=True, scale=scale)
    workers = recipe.tokens.workers or cores()
    rate = (
        workers * estimate.rate_of(tokenizer, texts, engine_of(recipe.tokens, pipeline.terminal.note))
        if texts
        else None
    )
    return Plan(
        config=pipeline.config,
        folder=str(folder),
        corpus=corpus.record.name,
        repo=corpus.record.details.get("repo", ""),
        commit=corpus.record.details.get("commit", ""),
        source_files=len(corpus.sources),
        files=expected.files,
        rows=expected.rows,
        download=expected.download,
        download_rate=estimate.download_rate(corpus) if expected.download else None,
        tokens=expected.tokens,
        done_tokens=sum(part.tokens for part in parts),
        shards=expected.shards,
        peak=expected.peak,
        free=shutil.disk_usage(pipeline.layout.home).free,
        workers=workers,
        rate=rate,
        vocabulary_seconds=vocabulary_seconds,
        vocab_size=wanted.tokenizer.vocab_size if wanted.tokenizer else recipe.tokens.vocab_size,
    )


def _ready(pipeline: Pipeline, given: list[Path]) -> Plan:
    """The plan of a recipe that names token folders: they are there, and nothing is prepared."""
    manifests = [Manifest.read(folder) for folder in given]
    tokens = sum(manifest.tokens("train") + manifest.tokens("val") for manifest in manifests)
    return Plan(
        config=pipeline.config,
        folder=", ".join(map(str, given)),
        corpus=", ".join(manifest.corpus.name for manifest in manifests),
        tokens=tokens,
        done_tokens=tokens,
        free=shutil.disk_usage(pipeline.layout.home).free,
        vocab_size=manifests[0].tokenizer.vocab_size,
    )


def training(pipeline: Pipeline, plan: Plan) -> Training | None:
    """Measure some steps of the recipe's training; None when the recipe does not say how long it trains."""
    recipe = pipeline.recipe
    if not (recipe.train.tokens or recipe.train.steps):
        return None
    checks.require_trainable(pipeline.layout, recipe)
    from train.dry_run import dry_run
    from train.machine.device import device_name, pick_device, resolve_precision
    from train.micro_batch import best_fit
    from train.schedule import Ramp
    from train.state.saver import most_at_once
    from train.telemetry.flops import flops_per_token, peak

    pipeline.terminal.note("measuring some steps of training")
    model, optim, train, vocab_size = recipe.model, recipe.optim, recipe.train, plan.vocab_size
    ramp, device = Ramp(model, train), pick_device(train.device)
    precision = resolve_precision(train, device)
    fit = best_fit(model, optim, train, vocab_size, device, pipeline.layout.fits)
    most = peak(device, precision)
    val_tokens = int(plan.tokens * recipe.tokens.val_fraction)
    found = dry_run(model, optim, train, vocab_size, device, fit, val_tokens)
    hours = found.seconds / 3600
    kwh = None if found.watts is None else found.watts * hours / 1000
    return Training(
        device=device_name(device),
        precision=str(precision).removeprefix("torch."),
        tokens=ramp.tokens,
        steps=ramp.steps,
        batch_tokens=train.batch_tokens,
        micro_batch=fit.micro_batch,
        measured_sequences=found.micro_batches * found.size,
        measured_steps=found.steps,
        tok_per_s=found.tok_per_s,
        mfu_percent=100 * found.tok_per_s * flops_per_token(model, vocab_size) / most.flops,
        peak_flops=most.flops,
        peak_source=most.source,
        hours=hours,
        watts=found.watts,
        kwh=kwh,
        cost=kwh * train.kwh_price if kwh is not None and train.kwh_price else None,
        checkpoint=found.checkpoint_bytes,
        saves=most_at_once(train.keep_checkpoints) * found.checkpoint_bytes,
    )
