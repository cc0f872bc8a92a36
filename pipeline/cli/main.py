"""The command line. No logic lives here: a verb reads its options, calls one function and prints what comes back."""

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import (
    as_json,
    deadline,
    home,
    max_hours,
    pipeline_of,
    print_json,
    print_lines,
    settings,
    terminal,
)
from pipeline.cli.run_verbs import evaluate, export, resume, sample, status
from pipeline.cli.shard_verbs import shards
from shards.errors import TRACEBACK, HostError, Interrupted, MillpondError, OutOfTime, converted
from train.machine.ranks import is_first_to_fail, is_silent
from train.machine.signals import ended_by

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.stages import Pipeline


# torch's threads spin while they wait for each other, for 300,000 turns. Where another program has taken a core, what
# they wait for does not run: a step on two cores took seven times as long. With 3,000 turns it does not, and where
# nothing else runs it costs little (3 % in five pairs of runs, 12 % in the worst; Nov 2026). Read when torch loads.
SPINS = "3000"


class _Failed(click.ClickException):
    """A MillpondError on its way out: its text, its exit code."""

    def __init__(self, error: MillpondError) -> None:
        super().__init__(str(error))
        self.word = "stopped" if isinstance(error, Interrupted | OutOfTime) else "error"
        self.exit_code = error.exit_code  # type: ignore[misc]  # click calls it a class variable and reads the instance

    def show(self, file: Any = None) -> None:
        if is_first_to_fail():
            terminal().error(self.message, self.word)


class _Main(click.Group):
    """The one place where errors become exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # or workers import modules of the working folder
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        # SIGINT too: a script's background job is born with it ignored, and then `kill -INT` would do nothing
        stop = _Stop()
        before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, *ended_by())}
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except _Signalled as signalled:
            kept = _KEPT.get(ctx.invoked_subcommand or "", "nothing was changed")
            raise _Failed(Interrupted(signalled.signum, kept)) from None
        except Exception as error:
            if os.environ.get(TRACEBACK):
                logging.getLogger(__name__).exception("where it happened")
            raise _Failed(converted(error)) from error
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


_KEPT = {
    **dict.fromkeys(("prepare", "fetch", "tokenize", "train", "resume"), "what was sealed before is kept"),
    "shards": "nothing half-written was published",
}


class _Signalled(KeyboardInterrupt):
    """A signal, raised where the command is; no `except Exception` on the way holds it."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class _Stop:
    """The handler of all these signals: the first ends the command in order, the second at once, in any wait."""

    seen = False

    def __call__(self, signum: int, _frame: object) -> None:
        if self.seen:
            os._exit(128 + signum)
        self.seen = True
        raise _Signalled(signum)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="millpond")
def main() -> None:
    """Prepare token shards once, train language models from them on one GPU, and trust every step.

    CONFIG is a preset's name (demo, overnight, gpt2, gpt2-tuned, gpt2-book) or a TOML file; RUN is a run's name.
    Rerunning a command resumes it, or reports that it is done.
    """
    logging.basicConfig(format="%(message)s", level=logging.ERROR if is_silent() else logging.WARNING)
    if not is_silent():
        logging.getLogger("train.micro_batch").setLevel(
            logging.INFO
        )  # it takes minutes, and says each size it has timed


_config = click.argument("config", default="demo")
_force = click.option("--force", is_flag=True, help="Redo this stage even if it is up to date.")

for _verb in (resume, evaluate, sample, export, status, shards):
    main.add_command(_verb)


@main.command()
@_config
@settings
@click.option("--dry-run", is_flag=True, help="Only print the plan.")
@home
def prepare(config: str, settings: tuple[str, ...], dry_run: bool, home: Path) -> None:
    """Text in, verified token shards out: fetch, tokenize, verify."""
    pipeline = _pipeline(config, settings, home)[1]
    if dry_run:
        _plan(pipeline, say=True)
    else:
        pipeline.prepare()


@main.command()
@_config
@settings
@as_json
@home
def plan(config: str, settings: tuple[str, ...], as_json: bool, home: Path) -> None:
    """Estimate download, disk and time, and measure some training steps: hours, kWh, cost."""
    from pipeline.cli.pages import training_lines
    from pipeline.plan import training

    pipeline = _pipeline(config, settings, home)[1]
    pipeline.require_device()
    found = _plan(pipeline, say=not as_json)
    trained = training(pipeline, found)
    if as_json:
        print_json({**found._asdict(), "training": trained and trained._asdict()})
    elif trained:
        print_lines(training_lines(trained))


@main.command()
@_config
@settings
@_force
@home
def fetch(config: str, settings: tuple[str, ...], force: bool, home: Path) -> None:
    """Download, hash and pin the corpus's files."""
    pipeline = _pipeline(config, settings, home)[1]
    pipeline.fetch(pipeline.pin(force=force))


@main.command()
@_config
@settings
@_force
@home
def tokenize(config: str, settings: tuple[str, ...], force: bool, home: Path) -> None:
    """Encode the corpus into a token folder."""
    pipeline = _pipeline(config, settings, home)[1]
    pipeline.tokenize(pipeline.pin(), force=force)


@main.command()
@click.argument("target", metavar="FOLDER|CONFIG", default="demo")
@click.option("--quick", is_flag=True, help="Compare only sizes and headers.")
@settings
@home
def verify(target: str, quick: bool, settings: tuple[str, ...], home: Path) -> None:
    """Compare every byte of a token folder with its manifest. Nothing is fetched or tokenized.

    FOLDER is a token folder's name or path; of a CONFIG, the token folders it trains on are compared.
    """
    from pipeline.config import preset_names
    from pipeline.home import folders
    from pipeline.home.layout import Layout

    layout, found = Layout(home), []
    if target.endswith(".toml") or target in preset_names():
        found = _pipeline(target, settings, home)[1].prepared()
    compared = "sizes and headers as they were" if quick else "every byte as it was"
    for path in found or [folders.find(layout, target)]:
        fix = "millpond tokenize CONFIG --force, or for what was pulled: millpond shards pull URL"
        folders.require_valid(layout, path, fix, full=not quick)
        terminal().stage("verify", f"{path.name}  {compared} written")


@main.command()
@_config
@click.option("--name", metavar="RUN", help="The run's name [default: the config's].")
@click.option("--fresh", is_flag=True, help="Start over; the old run is kept as NAME.1.")
@max_hours
@settings
@home
def train(config: str, name: str | None, fresh: bool, max_hours: float, settings: tuple[str, ...], home: Path) -> None:
    """Prepare what is missing, then train, evaluate and print samples."""
    from pipeline import training

    until = deadline(max_hours)
    preset, pipeline = _pipeline(config, settings, home)
    training.train(pipeline, name or _run_of(Path(config)) or preset, fresh=fresh, until=until)


@main.command()
@as_json
@home
def doctor(as_json: bool, home: Path) -> None:
    """Check Python, packages, memory, disk and GPU."""
    from pipeline.cli.pages import doctor_lines
    from pipeline.doctor import as_json as to_json
    from pipeline.doctor import examine
    from pipeline.home.layout import Layout

    checks = examine(Layout(home))
    if as_json:
        print_json(to_json(checks))
    else:
        print_lines(doctor_lines(checks))
    if bad := [check.name for check in checks if check.state == "bad"]:
        raise HostError(f"this machine fails the checks: {', '.join(bad)}")


def _pipeline(config: str, settings: tuple[str, ...], home: Path) -> "tuple[str, Pipeline]":
    from pipeline.config import load

    name, recipe = load(config, settings)
    return name, pipeline_of(config, recipe, home)


def _run_of(config: Path) -> str:
    """The run whose own run.toml is given; none for another recipe."""
    from pipeline.home.layout import RunPaths

    run = RunPaths(config.absolute().parent)
    return run.root.name if config.name == run.recipe.name and run.tokens.exists() else ""


def _plan(pipeline: "Pipeline", *, say: bool) -> "Plan":
    from pipeline.cli.pages import plan_lines
    from pipeline.plan import plan

    found = plan(pipeline)
    if say:
        print_lines(plan_lines(found))
    return found


if __name__ == "__main__":
    main()
