"""A row's columns: the text must be there and be text; what filters ask for may be missing."""

from collections.abc import Sequence
from typing import Any

from shards.errors import ConfigError


class Spelled(str):
    """A field of a csv or tsv file: text that may spell a number, which only the filter that compares it knows."""


class Repeated(dict[str, Any]):
    """An object of JSON in which some names are there twice."""

    def __init__(self, row: dict[str, Any], names: frozenset[str]) -> None:
        super().__init__(row)
        self.names = names


def values(row: Any, place: str, columns: Sequence[str]) -> tuple[Any, ...]:
    """The columns' values in an object of JSON, the text's first. ConfigError unless that is text or null."""
    if not isinstance(row, dict) or columns[0] not in row:
        names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise no_column(f"{place}: no field {columns[0]!r}, it has {names}", is_text=True)
    if isinstance(row, Repeated):
        for name in row.names.intersection(columns):
            raise twice(place, name)
    text = row[columns[0]]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{place}: field {columns[0]!r} is {type(text).__name__}, not text", "", "fix that row")
    return tuple(row.get(name) for name in columns)


def require_columns(names: Sequence[str], columns: Sequence[str], where: str) -> None:
    """ConfigError unless every one of `columns` is among a file's columns `names`, once."""
    for i, name in enumerate(columns):
        if name not in names:
            raise no_column(f"{where}: no column {name!r}, it has {', '.join(names)}", is_text=i == 0)
        if list(names).count(name) > 1:
            raise twice(where, name)


def twice(where: str, name: str) -> ConfigError:
    """The error for a column that is there more than once."""
    return ConfigError(
        f"{where}: more than one column is named {name!r}", "only one of them would be read", "rename one"
    )


def no_column(what: str, is_text: bool) -> ConfigError:
    """The error for a column that is not there."""
    if is_text:
        why, fix = "the documents are read from one field of text", "name it with --set corpus.text_column=NAME"
        return ConfigError(what, why, fix)
    return ConfigError(what, "corpus.filters asks for it", "fix the filter, or leave it out")
