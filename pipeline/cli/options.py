"""What several verbs share: the options they have in common, and the way from them to the stages."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.stages import Pipeline
    from pipeline.terminal import Terminal

F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT = "MILLPOND_SET"  # make's SET, which no shell has read
_NEXT = re.compile(r"""\s+(?=['"]?[a-z_]+\.[a-z_.]+\s*=)""")


def split_settings(text: str) -> tuple[str, ...]:
    """The settings in one string, each as it is, spaces and quotes in its value too, but for quotes around it."""
    found = _NEXT.split(text.strip()) if text.strip() else []
    quoted = [each[0] in "'\"" and each[0] == each[-1] and len(each) > 1 for each in found]
    return tuple(each[1:-1] if is_quoted else each for each, is_quoted in zip(found, quoted, strict=True))


def _with_environment(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    return (*split_settings(os.environ.get(ENVIRONMENT, "")), *given)


settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.FIELD=VALUE",
    callback=_with_environment,
    help="Override one field.",
)
max_hours = click.option(
    "--max-hours",
    type=click.FloatRange(0, min_open=True),
    default=math.inf,
    metavar="H",
    help="Checkpoint and exit (code 75) after H hours; run it again to resume.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")


def home(command: F) -> F:
    """Where everything is kept."""
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("data"),
        envvar="MILLPOND_HOME",
        show_default=True,
        help="Where shards and runs are kept (also MILLPOND_HOME).",
    )(command)


def deadline(max_hours: float) -> float:
    """When, by time.monotonic(), so many hours from now are over."""
    if math.isnan(max_hours):
        raise click.BadParameter("nan is not a number of hours", param_hint="--max-hours")
    return time.monotonic() + 3600 * max_hours


def terminal() -> "Terminal":
    """What prints while work is in progress."""
    from pipeline.terminal import Terminal

    return Terminal()


def pipeline_of(config: str, recipe: "Recipe", home: Path) -> "Pipeline":
    """The stages of a recipe."""
    from pipeline.home.layout import Layout
    from pipeline.stages import Pipeline

    return Pipeline(Layout(home), config, recipe, terminal())


def print_json(value: Any) -> None:
    """`value` on stdout, for a program."""
    click.echo(json.dumps(value, indent=2))


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout, for a person."""
    for line in lines:
        click.echo(line)
