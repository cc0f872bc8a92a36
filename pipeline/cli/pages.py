"""What a verb prints when it has been asked for something, in lines of at most 80 columns.

What is said while work is in progress is in pipeline/terminal.py.
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.numbers import count, plural, size, thousands

if TYPE_CHECKING:
    from pipeline.doctor import Check
    from pipeline.home.folders import FolderSummary
    from pipeline.plan import Plan, Training

WIDTH = 40  # of a histogram's longest bar


def plan_lines(plan: "Plan") -> Iterator[str]:
    """The plan for a person, at most 80 columns."""
    yield f"corpus    {plan.corpus}" + (f"  {plan.repo} at {plan.commit[:12]}" if plan.repo else "")
    rows = f", {plan.rows:,} rows" if plan.rows else ""
    yield f"files     {plan.files:,} of {plan.source_files:,}{rows}"
    here = f", {count(plan.done_tokens)} of them here" if plan.done_tokens else ""
    yield f"tokens    about {count(plan.tokens)}{here}"
    if plan.download_rate:
        seconds = plan.download / plan.download_rate
        yield f"download  {size(plan.download)}, {_duration(seconds)}; {size(plan.download_rate)}/s, measured now"
    else:
        yield f"download  {size(plan.download)}" if plan.download else "download  nothing"
    fits = "" if plan.peak < plan.free else "  NOT ENOUGH"
    sizes = [f"{size(n)} {what}" for n, what in ((plan.shards, "of shards"), (plan.peak, "at the peak"))]
    yield f"disk      {', '.join(sizes)}, {size(plan.free)} free{fits}"
    if plan.rate:
        seconds = (plan.tokens - plan.done_tokens) / plan.rate
        if plan.vocabulary_seconds >= 1:
            yield f"time      {_duration(plan.vocabulary_seconds)} of training the vocabulary, measured now"
        workers = plural(plan.workers, "worker")
        yield f"time      {_duration(seconds)} of tokenizing; {workers}, {count(plan.rate)} tok/s, measured now"
    yield f"folder    {plan.folder}"


def training_lines(training: "Training") -> Iterator[str]:
    """What training takes, for a person, at most 80 columns."""
    peak = " ".join(thousands(training.peak_flops))
    yield f"train     {count(training.tokens)} tokens in {training.steps:,} steps, {training.precision}"
    yield f"device    {training.device}"
    percent, source = training.mfu_percent, training.peak_source
    yield f"speed     {training.tok_per_s:,.0f} tok/s, {percent:.1f} % of {peak}FLOP/s ({source})"
    yield f"time      {_duration(3600 * training.hours)} with evaluations; {_measured(training)}"
    if training.watts is not None and training.kwh is not None:
        cost = "" if training.cost is None else f", cost {training.cost:.2f}"
        yield f"energy    {training.kwh:.3g} kWh of the GPU{cost}; {training.watts:.0f} W, measured now"
    yield f"saves     {size(training.saves)} at most, {size(training.checkpoint)} a checkpoint"


def _measured(training: "Training") -> str:
    if training.measured_steps:
        return f"{plural(training.measured_steps, 'step')} measured now"
    return f"{plural(training.measured_sequences, 'sequence')} measured now, less than a step"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def status_lines(found: dict[str, Any], home: Path) -> Iterator[str]:
    """The token folders and runs of a home."""
    if not found["tokens"] and not found["runs"]:
        yield f"nothing under {home.absolute()} yet"
        yield "millpond train makes a first run; --home DIR or MILLPOND_HOME names another home"
    for row in found["tokens"]:
        tokens = f"{row['train_tokens']:,} + {row['val_tokens']:,} tokens, " if row["tokenizer"] else ""
        yield from _row(f"tokens  {row['folder']}", f"{tokens}{row['state']}")
    for row in found["runs"]:
        loss = f", validation {row['val_loss']:.4f} (step {row['val_step']:,})" if "val_loss" in row else ""
        elsewhere = "" if row["tokens_here"] else ", its tokens are not here"
        saved = f", saved {row['checkpoint']}" if row["checkpoint"] else ""
        yield from _row(f"run     {row['run']}", f"{row['state']}, step {row.get('step', 0):,}{loss}{saved}{elsewhere}")


def evaluation_lines(found: dict[str, Any]) -> Iterator[str]:
    """The validation loss of a run."""
    loss = f"{found['val_loss']:.4f} nats/token, {found['val_bpb']:.4f} bits/byte"
    yield f"{found['run']}, step {found['step']:,}: {loss}"
    yield f"over {found['val_tokens']:,} validation tokens of {found['token_folder']}, context {found['seq_len']}"
    for folder, loss_there in found.get("val_loss_by_folder", {}).items():
        yield f"  {folder}: {loss_there:.4f} nats/token"


def doctor_lines(checks: "Sequence[Check]") -> Iterator[str]:
    """What was checked, how it is, and what to do about it."""
    for check in checks:
        yield f"{check.state:<8} {check.name:<9} {check.found}"
        for line in check.advice.splitlines():
            yield f"{'':<18} {line}"


def folder_lines(rows: "Sequence[FolderSummary]", home: Path) -> Iterator[str]:
    """Every token folder, and the runs that were started on it."""
    if not rows:
        yield f"no token folder under {home.absolute()} yet"
        yield "millpond prepare makes one; --home DIR or MILLPOND_HOME names another home"
    for row in rows:
        tokens = count(row.train_tokens + row.val_tokens)
        yield f"{row.folder:<32} {tokens:>7} tokens  {size(row.nbytes):>9}  {row.state}"
        if row.runs:
            yield f"{'':<32} runs: {', '.join(row.runs)}"


def statistics_lines(found: dict[str, Any]) -> Iterator[str]:
    """What is in a token folder, with a histogram of its documents' lengths."""
    source = "  ".join(f"{value}" for key, value in found["corpus"].items() if key in ("name", "repo", "commit"))
    yield f"{found['folder']}  {source}"
    yield (
        f"  {found['train_tokens']:,} + {found['val_tokens']:,} tokens (train + val) of {found['tokenizer']}, "
        f"{found['documents']:,} documents"
    )
    yield f"  {found['text_bytes']:,} bytes of text, {found['bytes_per_token']:.3f} bytes per token"
    yield f"  {found['rows']:,} rows were read"
    for reason, dropped in found["dropped"].items():
        yield f"  {dropped:,} rows were dropped: {reason}"
    yield f"  tokens a document, median {found['median_length']:,}, longest {found['longest']:,}:"
    most = max(found["lengths"].values(), default=1)
    for lengths, documents in found["lengths"].items():
        yield f"  {lengths:>16}  {documents:>10,}  {'#' * -(-documents * WIDTH // most)}"


def _row(name: str, what: str) -> Iterator[str]:
    """One row of a list, wrapped at 80 columns."""
    for i, line in enumerate(textwrap.wrap(what, 80 - 8 - 26, break_long_words=False)):
        yield f"{name if not i else '':<32}  {line}"
