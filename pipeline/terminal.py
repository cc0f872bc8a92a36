"""What a person sees: one line a stage, one line a log step, at most 80 columns. Results on stdout, the rest on stderr.

rich colours and draws where there is a terminal; elsewhere the same lines come plain.
"""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, assert_never

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.home.layout import RunPaths
from shards.numbers import clock, count, thousands
from train import events

Row = dict[str, Any]
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal
WIDTH = 78
MIN_WIDTH = 20


class Terminal:
    """The one place that prints while work is in progress."""

    def __init__(self) -> None:
        width = None if Console().width >= MIN_WIDTH else 80  # COLUMNS=0 would show nothing
        self._out = Console(highlight=False, markup=False, soft_wrap=True, width=width)
        self._log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, width=width)
        self._in_table = False  # whether the line before was one of a table with this header

    def stage(self, name: str, what: str, *, done: bool = False) -> None:
        """A stage is finished, now or `done` already by a run before."""
        line = Text(f"{name:<9} ", style="dim" if done else "bold green")
        self._log.print(
            line.append(what + (", already done" if done else ""), style="dim" if done else "not bold default")
        )

    def note(self, text: str) -> None:
        """Something worth knowing that is no error."""
        self._log.print(Text(f"{'':<9} {text}", style="yellow"))

    @contextmanager
    def tokens(self, estimate: int) -> Iterator[Callable[[int], None]]:
        """Progress of tokenizing about `estimate` tokens: call what is yielded with each new count."""
        began = last = time.perf_counter()
        done = 0
        with Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(30),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._log,
            transient=True,
            disable=not self._log.is_terminal,
        ) as bar:
            task = bar.add_task("tokenize", total=estimate, rate="")

            def advance(tokens: int) -> None:
                nonlocal done, last
                done += tokens
                now = time.perf_counter()
                rate = f"{count(done)} tokens, {count(done / (now - began))} tok/s"
                bar.update(task, completed=done, total=max(estimate, done), rate=rate)
                if not self._log.is_terminal and now - last > PLAIN_SECONDS:
                    last = now
                    self._log.print(f"{'tokenize':<9} {rate}")

            yield advance

    def training(self, event: events.Event) -> None:
        """Show one event of the training loop."""
        match event:
            case events.Started():
                self._start(event)
            case events.Logged():
                self._row(event)
            case events.Evaluated(row):
                self._eval(row)
            case events.Sampled():
                self._sample(event.text)
            case events.RolledBack():
                self._rollback(event)
            case events.Ended():
                self._end(event)
            case events.Saved():
                return
            case _:
                assert_never(event)
        self._in_table = isinstance(event, events.Logged)

    def finished(self, name: str, run: RunPaths, numbers: Row) -> None:
        """The run's end, on stdout."""
        self._out.print(
            f"{name}: {numbers['steps']:,} steps, {numbers['tokens']:,} tokens; "
            f"validation {numbers['val_loss']:.4f} nats/token, {numbers['val_bpb']:.4f} bits/byte\n"
            f"over {numbers['val_tokens']:,} validation tokens; everything is in {run.root}"
        )

    def error(self, text: str, word: str = "error") -> None:
        """Why the command ended; `word` says whether that was an error."""
        first, _, rest = text.partition("\n")
        self._log.print(Text(f"{word}: ", style="bold red").append(first, style="not bold default"))
        if rest:
            self._log.print(Text(rest))

    def _start(self, event: events.Started) -> None:
        steps = f"{event.steps:,}"
        begins = f"resumes at step {event.step:,} of {steps}, steps" if event.step else f"{steps} steps"
        self._log.print(
            Text("train     ", style="bold green").append(
                f"{event.family}, {event.parameters:,} parameters, {event.precision} on {event.device}",
                style="not bold default",
            )
        )
        processes = f"{event.processes} processes x " if event.processes > 1 else ""
        micro = f"{processes}{event.accumulation} x {event.micro_batch} x {event.seq_len}"
        self._log.print(f"{'':<9} {begins} of {event.batch_tokens:,} tokens ({micro}), epoch {event.epoch_tokens:,}")
        if event.batch_tokens != event.last_batch_tokens:
            self._log.print(f"{'':<9} growing to {event.last_batch_tokens:,} tokens a step")
        each, peak = (" ".join(thousands(number)) for number in (event.flops_per_token, event.peak_flops))
        self._log.print(f"{'':<9} {each}FLOP per token, peak {peak}FLOP/s ({event.peak_source})")
        if not event.step:
            self._log.print(f"{'':<9} evaluating the untrained model")

    def _row(self, event: events.Logged) -> None:
        """A row of a table whose header comes again after whatever stood between."""
        row = event.row
        width = max(9, 2 * len(str(event.steps)) + 1)
        columns = {
            "step": f"{row['step']}/{event.steps}".rjust(width),
            "loss": f"{row['loss']:9.4f}",
            "lr": f"{_short(row['lr']):>9}",
            "grad": f"{row['grad_norm']:8.2f}",
            "tok/s": f"{count(row['tok_per_s']):>8}",
            "MFU": f"{row['mfu_percent']:6.1f}%",
            "stall": f"{row['stall_percent']:7.2f}%",
        }
        if "watts" in row:
            columns["watts"] = f"{row['watts']:7.0f}"
        columns["left"] = f"{clock(event.eta_seconds):>10}"
        if not self._in_table:
            header = "".join(name.rjust(len(text)) for name, text in columns.items())
            self._log.print(Text(header, style="dim"))
        self._log.print("".join(columns.values()))

    def _end(self, event: events.Ended) -> None:
        row = event.summary
        energy = f"; {row['energy_kwh']:.3g} kWh" if "energy_kwh" in row else ""
        cost = f", cost {row['cost']:.2f}" if "cost" in row else ""
        self._log.print(
            Text("trained   ", style="bold green").append(
                f"{count(event.tokens)} tokens in {clock(3600 * row['hours'])}, {count(row['tok_per_s'])} tok/s, "
                f"{row['memory_gb']:.1f} GB{energy}{cost}",
                style="not bold default",
            )
        )
        if event.graphs:
            self._log.print(f"{'':<9} {event.graphs} graphs compiled")

    def _eval(self, row: Row) -> None:
        loss = f"{row['val_loss']:.4f} nats/token, {row['val_bpb']:.4f} bits/byte ({count(row['val_tokens'])} tokens)"
        self._log.print(Text(f"{row['step']:>9}  validation {loss}", style="cyan"))

    def _rollback(self, event: events.RolledBack) -> None:
        first, end = event.skipped
        line = f"{event.bad:>9}  back to step {event.step:,}, without windows {first:,} to {end - 1:,}"
        self._log.print(Text(line, style="yellow"))

    def _sample(self, text: str) -> None:
        text, indent = printable(" ".join(text.split())), " " * 11
        lines = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, max_lines=4)
        self._log.print(Text("\n".join(lines), style="dim"))


def _short(rate: float) -> str:
    """A rate in six characters."""
    return f"{rate:.1e}".replace("e-0", "e-").replace("e+00", "e+0")


def printable(text: str, keep: str = "") -> str:
    """The text with U+FFFD in place of what a terminal would act upon; the characters of `keep` stay."""
    return "".join(mark if mark.isprintable() or mark in keep else "\ufffd" for mark in text)
