"""What a person sees: one line a stage, one line a log step, at most 80 columns. Results on stdout, the rest on stderr.

rich colours and draws where there is a terminal; elsewhere the same lines come plain.
"""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.home.layout import RunPaths

Row = dict[str, Any]
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal
WIDTH = 78
MIN_WIDTH = 20


class Terminal:
    """The one place that says something while work goes on."""

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
                rate = f"{done / 1e6:,.1f} M tokens  {done / 1e6 / (now - began):.1f} M/s"
                bar.update(task, completed=done, total=max(estimate, done), rate=rate)
                if not self._log.is_terminal and now - last > PLAIN_SECONDS:
                    last = now
                    self._log.print(f"{'tokenize':<9} {rate}")

            yield advance

    def training(self, kind: str, row: Row) -> None:
        """One event of the training loop."""
        show = {
            "start": self._start,
            "log": self._row,
            "eval": self._eval,
            "sample": self._sample,
            "rollback": self._rollback,
            "end": self._end,
        }.get(kind)
        if show:
            show(row)
            self._in_table = kind == "log"

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

    def _start(self, row: Row) -> None:
        steps = f"{row['steps']:,}"
        begins = f"resumes at step {row['step']:,} of {steps}, steps" if row["step"] else f"{steps} steps"
        self._log.print(
            Text("train     ", style="bold green").append(
                f"{row['family']}, {row['parameters']:,} parameters, {row['precision']} on {row['device']}",
                style="not bold default",
            )
        )
        processes = f"{row['processes']} processes x " if row["processes"] > 1 else ""
        micro = f"{processes}{row['accumulation']} x {row['micro_batch']} x {row['seq_len']}"
        self._log.print(f"{'':<9} {begins} of {row['batch_tokens']:,} tokens ({micro}), epoch {row['epoch_tokens']:,}")
        if row["batch_tokens"] != row["last_batch_tokens"]:
            self._log.print(f"{'':<9} growing to {row['last_batch_tokens']:,} tokens a step")
        each, peak = (" ".join(thousands(row[key])) for key in ("flops_per_token", "peak_flops"))
        self._log.print(f"{'':<9} {each}FLOP a token (6 N + 12 L D T), peak {peak}FLOP/s ({row['peak_source']})")

    def _row(self, row: Row) -> None:
        """A row of a table whose header comes again after whatever stood between."""
        width = max(9, 2 * len(str(row["steps"])) + 1)
        columns = {
            "step": f"{row['step']}/{row['steps']}".rjust(width),
            "loss": f"{row['loss']:9.4f}",
            "lr": f"{_short(row['lr']):>9}",
            "grad": f"{row['grad_norm']:8.2f}",
            "tok/s": f"{_count(row['tok_per_s']):>8}",
            "MFU": f"{row['mfu_percent']:6.1f}%",
            "stall": f"{row['stall_percent']:7.2f}%",
        }
        if "watts" in row:
            columns["watts"] = f"{row['watts']:7.0f}"
        columns["left"] = f"{_clock(row['eta_seconds']):>10}"
        if not self._in_table:
            header = "".join(name.rjust(len(text)) for name, text in columns.items())
            self._log.print(Text(header, style="dim"))
        self._in_table = True
        self._log.print("".join(columns.values()))

    def _end(self, row: Row) -> None:
        energy = f"; {row['energy_kwh']:.3g} kWh" if "energy_kwh" in row else ""
        cost = f", cost {row['cost']:.2f}" if "cost" in row else ""
        self._log.print(
            Text("trained   ", style="bold green").append(
                f"{_count(row['tokens'])} tokens in {_clock(3600 * row['hours'])}, {_count(row['tok_per_s'])} tok/s, "
                f"{row['memory_gb']:.1f} GB{energy}{cost}",
                style="not bold default",
            )
        )
        if row["graphs"]:
            self._log.print(f"{'':<9} {row['graphs']} graphs compiled")

    def _eval(self, row: Row) -> None:
        loss = f"{row['val_loss']:.4f} nats/token, {row['val_bpb']:.4f} bits/byte ({_count(row['val_tokens'])} tokens)"
        self._log.print(Text(f"{row['step']:>9}  validation {loss}", style="cyan"))

    def _rollback(self, row: Row) -> None:
        first, end = row["windows_skipped"]
        line = f"{row['rollback_from']:>9}  back to step {row['step'] - 1:,}, without windows {first:,} to {end - 1:,}"
        self._log.print(Text(line, style="yellow"))

    def _sample(self, row: Row) -> None:
        text = "".join(mark if mark.isprintable() else "\ufffd" for mark in " ".join(row["text"].split()))
        lines = textwrap.wrap(text, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 11, max_lines=4)
        self._log.print(Text("\n".join(lines), style="dim"))


def _short(rate: float) -> str:
    """A rate in six characters."""
    return f"{rate:.1e}".replace("e-0", "e-").replace("e+00", "e+0")


def thousands(number: float) -> tuple[str, str]:
    """Three digits and the thousands they count: 854.4e6 is "854" and "M"."""
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.{0 if number >= 99.95 else 1}f}", prefixes[0]


def _count(number: float) -> str:
    return "".join(thousands(number))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
