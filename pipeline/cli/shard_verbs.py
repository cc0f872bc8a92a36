"""millpond shards …: looking at token folders, checking and sharing them, and the formats of others."""

import re
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import as_json, home, print_json, print_lines, terminal
from pipeline.home.layout import Layout
from shards.atomic import make_folder
from shards.errors import RefusedError
from shards.numbers import size

_folder = click.argument("folder")
_split = click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)


@click.group()
def shards() -> None:
    """Token folders: look at them, check them, share them, convert them."""


@shards.command()
@as_json
@home
def ls(as_json: bool, home: Path) -> None:
    """Every token folder, and the runs that were started on it."""
    from pipeline.cli.pages import folder_lines
    from pipeline.home.folders import table

    rows = table(Layout(home))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    print_lines(folder_lines(rows, home))


@shards.command()
@_folder
@click.option("--doc", type=click.IntRange(0), metavar="N", help="Print this document of the split instead.")
@_split
@as_json
@home
def inspect(folder: str, doc: int | None, split: Any, as_json: bool, home: Path) -> None:
    """What is in a token folder: documents, tokens, lengths, what was dropped and why."""
    from pipeline.cli.pages import statistics_lines
    from pipeline.home import folders
    from pipeline.terminal import printable

    path = folders.find(Layout(home), folder)
    if doc is not None:
        text = folders.document(path, split, doc)
        if as_json:
            print_json({"split": split, "document": doc, "text": text})
        else:
            click.echo(printable(text, keep="\n\t"))
        return
    found = folders.statistics(path)
    if as_json:
        print_json(found)
        return
    print_lines(statistics_lines(found))


@shards.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--name", required=True, help="What the token folder is called.")
@click.option("--val", "val_files", multiple=True, metavar="FILE", help="A file of validation tokens; may be repeated.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 0.5),
    metavar="F",
    help="Without --val: the share of documents, by their hash, for validation (default 0.005; 0 = none).",
)
@click.option("--tokenizer", default="gpt2", show_default=True, help="What made the tokens: gpt2, or a tokenizer file.")
@home
def import_(
    files: tuple[str, ...],
    name: str,
    val_files: tuple[str, ...],
    val_fraction: float | None,
    tokenizer: str,
    home: Path,
) -> None:
    """Make a token folder from tokens that nanoGPT, llm.c, Megatron or numpy wrote."""
    from pipeline.home.runs import checked_name
    from pipeline.imports import import_tokens

    import_tokens(files, val_files, checked_name(name), val_fraction, tokenizer, home, terminal())


@shards.command()
@_folder
@click.argument("form", type=click.Choice(["nanogpt", "npy", "megatron"]))
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write into.")
@_split
@home
def export(folder: str, form: Any, to: Path, split: Any, home: Path) -> None:
    """Write a split as one file in another trainer's format (llm.c reads the shards as they are)."""
    from pipeline.home.folders import find
    from shards.interop import export as write
    from shards.reader import TokenFolder

    for path in write(TokenFolder(find(Layout(home), folder)), split, form, to):
        click.echo(path)


@shards.command()
@_folder
@click.argument("url")
@home
def push(folder: str, url: str, home: Path) -> None:
    """Send a token folder to hf://datasets/OWNER/NAME, to what fsspec knows (s3://…), or to another folder."""
    from pipeline.home.folders import find
    from shards.sharing.sync import push as send

    if "://" not in url:
        hub = f"; for the Hub: hf://datasets/{url}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", url) else ""
        terminal().note(f"to the folder {Path(url).expanduser().absolute()} of this machine{hub}")
    send(find(Layout(home), folder), url, terminal().note)


@shards.command()
@click.argument("url")
@click.option("--parts", type=click.IntRange(1), metavar="N", help="Only the first N parts.")
@home
def pull(url: str, parts: int | None, home: Path) -> None:
    """Fetch a token folder, every byte compared with its manifest; train uses it as it is."""
    from pipeline.home.folders import exclusive
    from pipeline.home.runs import checked_name
    from shards.sharing.sync import look
    from shards.sharing.sync import pull as fetch

    layout = Layout(home)
    layout.require_writable()
    manifest = look(url)
    folder = layout.token_folder(checked_name(manifest.corpus.name), manifest.fingerprint)
    make_folder(folder.parent)
    with exclusive(layout, folder.name):
        fetch(url, folder, terminal().note, parts=parts)
    click.echo(f"{folder}\nto train on it: millpond train CONFIG --set tokens.folder={folder.name}")


@shards.command()
@click.option("--yes", is_flag=True, help="Delete them; without it they are only listed.")
@home
def gc(yes: bool, home: Path) -> None:
    """The token folders that no run was started on."""
    from pipeline.home.folders import garbage, remove, sweep_removed

    if yes:
        sweep_removed(Layout(home))
    rows = garbage(Layout(home))
    for row in rows:
        what = "unused "
        if yes:
            try:
                remove(Layout(home), row)
                what = "deleted"
            except RefusedError as error:
                terminal().note(error.what)
                continue
        click.echo(f"{what} {row.folder}  {size(row.nbytes)}")
    if rows and not yes:
        click.echo("to delete them: millpond shards gc --yes")
    if not rows:
        click.echo("every token folder is used by a run")
