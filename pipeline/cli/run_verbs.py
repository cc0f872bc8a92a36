"""The verbs on runs that are there: what they reached, what they write, and which there are."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

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
from train.config import DeviceName
from train.machine.ranks import is_silent

if TYPE_CHECKING:
    from pipeline.home.layout import Layout, RunPaths

_run = click.argument("run", required=False)
_checkpoint = click.option(
    "--checkpoint",
    default="newest",
    show_default=True,
    metavar="STEP|best|PATH",
    help="Which checkpoint: of a step, best (by validation loss), or a checkpoint's folder.",
)
_best = click.option("--best", "checkpoint", flag_value="best", help="As --checkpoint best.")
_device = click.option(
    "--device", type=click.Choice(get_args(DeviceName)), help="Where to compute [default: train.device of the run]."
)


@click.command()
@_run
@click.option("--steps", type=click.IntRange(1, 2**40), metavar="N", help="Make the run N steps long in all.")
@click.option("--tokens", type=click.IntRange(1, 2**50), metavar="N", help="Make the run N tokens long in all.")
@max_hours
@_device
@settings
@home
def resume(
    run: str | None,
    steps: int | None,
    tokens: int | None,
    max_hours: float,
    device: DeviceName | None,
    settings: tuple[str, ...],
    home: Path,
) -> None:
    """Train a run on from where it stopped, with its own settings and tokens.

    RUN is a run's name or its folder [default: the run that was trained last]. --steps or --tokens makes a run
    longer, also one that is finished, and says what its learning rate does. --set overrides for this time what
    cannot change the result, for example train.micro_batch or train.log_every.
    """
    from pipeline import training
    from pipeline.config import load_run
    from pipeline.home.extension import Length

    if steps and tokens:
        raise click.UsageError("--steps and --tokens are two ways to say how long: use one of them")
    until = deadline(max_hours)
    layout, found = _found(home, run)
    chosen = (*settings, f"train.device={device}") if device else settings
    pipeline = pipeline_of(str(found.recipe), load_run(found.recipe, chosen), layout.home)
    length = Length(steps or 0, tokens or 0) if steps or tokens else None
    training.resume(pipeline, found, length=length, until=until)


@click.command()
@_run
@click.option(
    "--tokens", type=click.IntRange(0), default=0, metavar="N", help="Validation tokens to read [default: all]."
)
@_best
@_checkpoint
@_device
@as_json
@home
def evaluate(
    run: str | None, tokens: int, checkpoint: str, device: DeviceName | None, as_json: bool, home: Path
) -> None:
    """The validation loss of a run's checkpoint.

    RUN is a run's name or its folder [default: the run that was trained last].
    """
    from pipeline import inference
    from pipeline.cli.pages import evaluation_lines

    found = inference.evaluate(*_found(home, run), tokens, checkpoint=checkpoint, device=device)
    if as_json:
        print_json(found)
        return
    print_lines(evaluation_lines(found))


@click.command()
@_run
@click.option("--prompt", default="The", show_default=True, help="The text to continue.")
@click.option(
    "--tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="How many tokens to add."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.8, show_default=True, help="0: most likely token."
)
@click.option("--top-k", type=click.IntRange(0), default=50, show_default=True, help="Of the k most likely; 0: all.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, help="Of the fewest with this probability in all.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Of those with this part of the likeliest's.")
@click.option("--repetition-penalty", type=click.FloatRange(0.01, 100), default=1.0, help="Above 1: repeat less.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed for sampling."
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    metavar="N",
    help="How many texts, each with the next seed.",
)
@_best
@_checkpoint
@_device
@home
def sample(
    run: str | None,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int,
    count: int,
    checkpoint: str,
    device: DeviceName | None,
    home: Path,
) -> None:
    """Text from a run's checkpoint, shown as it is made.

    RUN is a run's name or its folder [default: the run that was trained last].
    """
    from pipeline import inference
    from pipeline.terminal import printable
    from train.sample import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    found = _found(home, run)
    texts = inference.sample(
        *found, prompt, tokens, sampling, seed=seed, count=count, stop=stop, checkpoint=checkpoint, device=device
    )
    for number, pieces in enumerate(texts, seed):
        if count > 1:
            click.echo(f"[seed {number}]")
        for piece in chain((prompt,), pieces):
            click.echo(printable(piece, keep="\n\t"), nl=False)
        click.echo()


@click.command()
@_run
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to make hf/ and gguf/ [default: the run's export/].",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(["hf", "gguf", "both"]),
    default="both",
    show_default=True,
    help="Of which.",
)
@click.option(
    "--dtype", type=click.Choice(["f32", "bf16", "f16", "q8_0"]), help="Of the matrices [default: hf f32, gguf q8_0]."
)
@_best
@_checkpoint
@click.option("--force", is_flag=True, help="Make it again, and replace what is there.")
@home
def export(
    run: str | None, to: Path | None, formats: Any, dtype: Any, checkpoint: str, force: bool, home: Path
) -> None:
    """A run's model for transformers (hf) and for llama.cpp (gguf), compared with it before it is called done.

    RUN is a run's name or its folder [default: the run that was trained last].
    """
    from pipeline import export as exporting

    chosen = exporting.FORMATS if formats == "both" else (formats,)
    layout, found = _found(home, run)
    for folder in exporting.export(
        layout, found, terminal(), to=to, formats=chosen, dtype=dtype, checkpoint=checkpoint, force=force
    ):
        click.echo(folder)


@click.command()
@as_json
@home
def status(as_json: bool, home: Path) -> None:
    """What is there: token folders and runs."""
    from pipeline.cli.pages import status_lines
    from pipeline.home.layout import Layout
    from pipeline.home.status import status as look

    found = look(Layout(home))
    if as_json:
        print_json(found)
        return
    print_lines(status_lines(found, home))


def _found(home: Path, asked: str | None) -> "tuple[Layout, RunPaths]":
    """The run that is asked for, and its home. When none is named, the newest run is taken and a note names it."""
    from pipeline.home import runs
    from pipeline.home.layout import Layout

    layout, run = runs.find(Layout(home), asked)
    if asked is None and not is_silent():
        terminal().note(f"{run.root.name} is the newest run")
    return layout, run
