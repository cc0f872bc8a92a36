"""What several verbs share: the options they have in common, and the way from them to the stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.stages import Pipeline
    from pipeline.terminal import Terminal

F = TypeVar("F", bound=Callable[..., Any])

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


def terminal() -> "Terminal":
    """What says something while work goes on."""
    from pipeline.terminal import Terminal

    return Terminal()


def pipeline_of(config: str, recipe: "Recipe", home: Path) -> "Pipeline":
    """The stages of a recipe."""
    from pipeline.layout import Layout
    from pipeline.stages import Pipeline

    return Pipeline(Layout(home), config, recipe, terminal())


def print_json(value: Any) -> None:
    """`value` on stdout, for a program."""
    click.echo(json.dumps(value, indent=2))
