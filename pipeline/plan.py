"""What a recipe will take, said before it begins."""

import shutil
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.stages import Pipeline, cores
from pipeline.tokens import TokenRecipe
from prepare import estimate, vocabulary


class Plan(NamedTuple):
    """About what preparing takes. Sizes are bytes; `rate` is tokens a second of all workers, None if not measured.

    `done_tokens` are there already; `files`, `rows` and `tokens` are those of the finished folder.
    """

    config: str
    folder: str
    corpus: str
    repo: str
    commit: str
    source_files: int
    files: int
    rows: int
    download: int
    tokens: int
    done_tokens: int
    shards: int
    peak: int
    free: int
    workers: int
    rate: float | None


def plan(pipeline: Pipeline) -> Plan:
    """Pin the corpus, read the footers it needs, and measure how fast this machine tokenizes some of it."""
    recipe, corpus = pipeline.recipe, pipeline.fetch()
    wanted = TokenRecipe(pipeline.layout, recipe, corpus)
    folder = pipeline.layout.token_folder(corpus.record.name, wanted.fingerprint)
    published = wanted.published(folder)
    parts = published.parts if published else []
    expected = wanted.expect(folder, parts, footers=True)
    done = sum(part.train.tokens + part.val.tokens for part in parts)
    workers = recipe.tokens.workers or cores()
    texts = estimate.sample(corpus) if expected.tokens > done else []
    tokenizer = wanted.tokenizer or vocabulary.gpt2()
    rate = workers * estimate.rate_of(tokenizer, texts, pipeline.engine()) if texts else None
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
        tokens=expected.tokens,
        done_tokens=done,
        shards=expected.shards,
        peak=expected.peak,
        free=shutil.disk_usage(pipeline.layout.home).free,
        workers=workers,
        rate=rate,
    )


def lines(plan: Plan) -> Iterator[str]:
    """The plan for a person, at most 80 columns."""
    yield f"corpus    {plan.corpus}" + (f"  {plan.repo} at {plan.commit[:12]}" if plan.repo else "")
    rows = f", {plan.rows:,} rows" if plan.rows else ""
    yield f"files     {plan.files:,} of {plan.source_files:,}{rows}"
    here = f", {plan.done_tokens / 1e6:,.1f} M of them here" if plan.done_tokens else ""
    yield f"tokens    about {plan.tokens / 1e6:,.1f} M{here}"
    yield f"download  {_gigabytes(plan.download)}" if plan.download else "download  nothing"
    fits = "" if plan.peak < plan.free else "  NOT ENOUGH"
    sizes = [f"{_gigabytes(n)} {what}" for n, what in ((plan.shards, "of shards"), (plan.peak, "at the peak"))]
    yield f"disk      {', '.join(sizes)}, {_gigabytes(plan.free)} free{fits}"
    if plan.rate:
        seconds = (plan.tokens - plan.done_tokens) / plan.rate
        workers = "1 worker" if plan.workers == 1 else f"{plan.workers} workers"
        yield f"time      {_duration(seconds)} of tokenizing; {workers}, {plan.rate / 1e6:.1f} Mtok/s, measured now"
    yield f"folder    {plan.folder}"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
