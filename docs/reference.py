"""Writes reference.md: every field of a recipe from the types, every verb from click. `make reference` runs it."""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import msgspec

from pipeline.cli.main import main
from pipeline.config import ALIASES, Recipe

PAGE = Path(__file__).with_name("reference.md")


def page() -> str:
    """The whole of reference.md."""
    parts = [
        "# Reference\n",
        "Every field of a recipe and every verb, written by `make reference` from the types and the command line.\n",
        "## Fields\n",
        "A field is set in the recipe's TOML file, or with `--set TABLE.FIELD=VALUE`. Those with * do not change the\n"
        "result: a run may be resumed with another value.\n",
    ]
    for table, kind in get_type_hints(Recipe).items():
        parts += [f"### [{table}]\n", f"{_sentence(kind)}\n", "| field | values | default | |\n|---|---|---|---|"]
        parts += [_field(kind, field) for field in msgspec.structs.fields(kind)]
        parts.append("")
    others = ", ".join(f"`{theirs}` is `{ours}`" for theirs, ours in sorted(ALIASES.items()))
    parts += [textwrap.fill(f"What others call them: {others}.", 120, break_on_hyphens=False) + "\n", "## Verbs\n"]
    parts += [_verb(path, command) for path, command in _verbs("millpond", main)]
    return "\n".join(parts).rstrip() + "\n"


def _sentence(kind: type[Any]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _field(kind: type[Any], field: msgspec.structs.FieldInfo) -> str:
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    info = msgspec.inspect.type_info(kind)
    found = next(each for each in info.fields if each.name == field.name)  # type: ignore[attr-defined]
    extra = found.type.extra if isinstance(found.type, msgspec.inspect.Metadata) and found.type.extra else {}
    mark = "*" if extra.get("identity") is False else ""
    shown = msgspec.json.encode(default).decode() if not isinstance(default, tuple) else str(list(default))
    hint = get_type_hints(kind)[field.name]
    return f"| `{field.name}`{mark} | {_values(hint, found.type)} | `{shown}` | {_comment(kind, field.name)} |"


def _values(hint: Any, info: Any) -> str:
    if isinstance(info, msgspec.inspect.Metadata):
        return _values(hint, info.type)
    literals = hint
    while literals is not None and get_origin(literals) is not Literal:
        literals = next(iter(get_args(literals)), None)
    words = ", ".join(f"`{each}`" for each in get_args(literals) if each != "") if literals is not None else ""
    low = next((f"≥ {value:,g}" for name in ("ge", "gt") if (value := getattr(info, name, None)) is not None), "")
    match type(info).__name__:
        case "IntType":
            return f"whole number {low}".strip()
        case "FloatType":
            return f"number {low}".strip()
        case "VarTupleType":
            item = info.item_type.type if isinstance(info.item_type, msgspec.inspect.Metadata) else info.item_type
            kinds = {"StrType": "text", "IntType": "whole numbers", "StructType": "tables"}
            return f"list of {words or kinds[type(item).__name__]}"
        case "DictType":
            return "table of numbers"
        case "BoolType":
            return "true, false"
        case "UnionType":
            return "true, false, unset"
        case _:
            return words or "text"


def _comment(kind: type[Any], name: str) -> str:
    """What the source says behind the field."""
    lines = inspect.getsource(kind).splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(rf"    {name}: ", line))
    depth, text = 0, ""
    for line in lines[at:]:
        code, _, comment = line.partition("  # ") if not line.lstrip().startswith("# ") else ("", "", line.lstrip()[2:])
        if text and code.strip():
            break
        depth += code.count("[") + code.count("(") - code.count("]") - code.count(")")
        text += f" {comment}" if comment else ""
        if depth <= 0 and not comment:
            break
    return text.strip().replace("|", "or")


def _verbs(path: str, command: click.Command) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    return [each for name, one in sorted(command.commands.items()) for each in _verbs(f"{path} {name}", one)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")  # which Markdown takes for the end of the cell, also in code


def _verb(path: str, command: click.Command) -> str:
    with click.Context(command, info_name=path, max_content_width=100) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        rows = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
    lines = [f"### {path}\n", f"`{path} {usage}`\n", f"{' '.join((command.help or '').split())}\n"]
    lines += [
        "| option | |\n|---|---|",
        *(f"| `{_cell(name)}` | {_cell(text)} |" for name, text in rows if text and "--help" not in name),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
