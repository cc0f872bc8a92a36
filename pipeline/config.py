"""One TOML file is one recipe. Unknown keys are refused with the nearest name; defaults are the structs'."""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from prepare.config import CorpusConfig, TokensConfig
from shards.atomic import publish_bytes
from shards.errors import ConfigError, from_os_error
from shards.fingerprint import neutral
from train.config import ModelConfig, OptimConfig, TrainConfig

PRESETS = Path(__file__).with_name("presets")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that determines a run."""

    corpus: CorpusConfig = CorpusConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


def preset_names() -> list[str]:
    """The presets that come with millpond."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(config: str, settings: tuple[str, ...] = ()) -> tuple[str, Recipe]:
    """The name and the recipe of a preset or a TOML file, `settings` ("optim.lr=0.01") laid over it."""
    path = PRESETS / f"{config}.toml"
    if config not in preset_names():
        path = Path(config)
        if path.suffix != ".toml":
            raise ConfigError(
                f"{config!r} is neither a preset nor a .toml file",
                f"presets: {', '.join(preset_names())}" + _nearest(config, preset_names()),
                f"millpond … {config}.toml" if Path(f"{config}.toml").is_file() else "",
            )
    data = _read(path)
    for setting in settings:
        _set(data, setting)
    recipe = _convert(data, str(path), settings)
    _refuse_ignored(recipe, settings)
    return path.stem, recipe


def load_run(path: Path, settings: tuple[str, ...] = ()) -> Recipe:
    """The recipe that was written beside a run, `settings` laid over it.

    A field that is not in it did not exist then, or was None: it gets its neutral value if it has one, whatever the
    default is by now.
    """
    data = _read(path)
    if isinstance(tokens := data.get("tokens"), dict) and tokens.get("engine") == "ray":  # as it was called before
        tokens |= {"engine": "fastokens", "executor": "ray"}
    for table, kind in get_type_hints(Recipe).items():
        if isinstance(fields := data.get(table, {}), dict):
            data[table] = neutral(kind) | fields
    for setting in settings:
        _set(data, setting)
    recipe = _convert(data, str(path), settings)
    _refuse_ignored(recipe, settings)
    return recipe


def save(recipe: Recipe, path: Path) -> None:
    """Write the whole recipe, defaults included."""
    publish_bytes(path, to_toml(msgspec.to_builtins(recipe)).encode())


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """The tables of a recipe without the fields that are None, which TOML does not know."""
    return tomli_w.dumps(
        {table: {key: value for key, value in fields.items() if value is not None} for table, fields in tables.items()}
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a file", "a recipe is one TOML file", "check the path")
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except (ValueError, RecursionError) as error:  # TOML errors, bad UTF-8, numbers of 5,000 digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    table, dot, field = key.strip().partition(".")
    if not (equals and dot and table and field):
        what = f"--set {setting}: expected TABLE.FIELD=VALUE{_meant(key.strip())}"
        raise ConfigError(what, "", "for example --set train.steps=1000")
    fields_of = {name: list(get_type_hints(kind)) for name, kind in get_type_hints(Recipe).items()}
    if field.partition(".")[0] not in fields_of.get(table, ()):
        raise ConfigError(f"--set {setting}: unknown key {key.strip()}{_meant(key.strip())}", _known(table))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word or path is text without quotes
    fields = data.setdefault(table, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"--set {setting}: {table} is not a table of fields", f"write [{table}] above its fields")
    field, nested, entry = field.partition(".")
    if not nested:
        fields[field] = value
    elif isinstance(entries := fields.setdefault(field, {}), dict):
        entries[entry] = value
    else:
        raise ConfigError(
            f"--set {setting}: {table}.{field} has a value already, and no names below it",
            "only a table, as tokens.mix is, has names below it",
            f"--set {table}.{field}=VALUE; for a table {{NAME=VALUE}}",
        )


def _convert(data: dict[str, Any], where: str, settings: tuple[str, ...] = ()) -> Recipe:
    tables = get_type_hints(Recipe)
    _refuse_unknown(data, list(tables), where, "")
    for table, fields in data.items():
        if isinstance(fields, dict):
            hints = get_type_hints(tables[table])
            _refuse_unknown(fields, list(hints), where, f"{table}.")
            for key, value in fields.items():
                if get_origin(hints[key]) is tuple and isinstance(value, str):
                    fields[key] = [value]
    try:
        return msgspec.convert(data, Recipe)
    except RecursionError as error:
        raise ConfigError(f"{where}: a value is nested too deeply") from error
    except msgspec.ValidationError as error:
        place = str(error).rpartition("`$.")[2].rstrip("`").partition("[")[0]
        where = next((f"--set {each}" for each in settings if each.partition("=")[0].strip() == place), where)
        table, _, field = place.partition(".")
        value = data[table][field] if field else data.get(table)
        if (place, value) == ("tokens.engine", "ray"):
            raise ConfigError(f"{where}: tokens.engine=ray has a new name", "", "--set tokens.executor=ray") from error
        what = f"{place} is {_short(value)}, expected {_expected(str(error))}"
        raise ConfigError(f"{where}: {what}", _words(tables, place)) from error


def _refuse_ignored(recipe: Recipe, settings: tuple[str, ...]) -> None:
    """ConfigError for a setting that says how tokens are made, where the recipe names tokens that are there."""
    if not (recipe.tokens.folder or recipe.tokens.mix):
        return
    named = "tokens.folder" if recipe.tokens.folder else "tokens.mix"
    for setting in settings:
        table, _, field = setting.partition("=")[0].strip().partition(".")
        if table == "corpus" or (table == "tokens" and field.partition(".")[0] not in ("folder", "mix")):
            raise ConfigError(
                f"--set {setting}: has no effect, because {named} is set",
                "the tokens that it names are used as they are",
                f"leave out {table}.{field}, or {named}",
            )


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
_BOUNDS = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}


def _expected(error: str) -> str:
    """What msgspec's error says was expected, in words."""
    said, _, place = error.rpartition(" - at ")
    each = " for each item" if "[" in place else ""
    if said.startswith("Invalid enum value"):
        return f"one of the known words{each}"
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", said):
        return f"{missing[1]} as well{each}"
    if not (match := re.match(r"Expected `([^`]+)`(?: ([<>]=?) (\S+?))?(?:,|$)", said)):
        length = re.fullmatch(r"Expected `str` of length <= (\d+)", said)
        if "matching regex" in said:
            return "letters, digits, '.', '_' and '-', none of '.' at its start"
        return f"at most {length[1]} characters{each}" if length else f"{said[0].lower()}{said[1:]}"
    types, bound, number = match.groups()
    words = " or ".join(_TYPES.get(name, name) for name in types.split(" | ") if name != "null")
    limit = (
        f" {_BOUNDS[bound]} {f'{int(number):,}' if number.isdigit() else number.removesuffix('.0')}" if bound else ""
    )
    return words + limit + each


def _short(value: Any) -> str:
    """A value of a recipe as TOML spells it, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _words(tables: dict[str, Any], place: str) -> str:
    """The words that are allowed at `place`, where only some are."""
    table, _, field = place.partition(".")
    choices = get_type_hints(tables[table]).get(field) if table in tables else None
    while choices is not None and get_origin(choices) is not Literal:
        choices = next(iter(get_args(choices)), None)
    return f"known: {', '.join(map(str, get_args(choices)))}" if choices is not None else ""


def _refuse_unknown(keys: dict[str, Any], known: list[str], where: str, prefix: str) -> None:
    for key in keys:
        if key not in known:
            names = ", ".join(prefix + name for name in known)
            raise ConfigError(f"{where}: unknown key {prefix}{key}{_meant(prefix + key)}", f"known: {names}")


def _known(table: str) -> str:
    tables = get_type_hints(Recipe)
    names = [f"{table}.{name}" for name in get_type_hints(tables[table])] if table in tables else list(tables)
    return f"known: {', '.join(names)}"


ALIASES = {  # what others call a field
    "batch_size": "train.batch_tokens",
    "block_size": "model.seq_len",
    "context": "model.seq_len",
    "context_length": "model.seq_len",
    "dataset": "corpus.name",
    "epochs": "train.tokens",
    "hidden_size": "model.d_model",
    "learning_rate": "optim.lr",
    "layers": "model.n_layer",
    "max_iters": "train.steps",
    "max_lr": "optim.lr",
    "max_steps": "train.steps",
    "n_ctx": "model.seq_len",
    "n_embd": "model.d_model",
    "n_layers": "model.n_layer",
    "num_heads": "model.n_head",
    "optimizer": "optim.name",
    "split": "tokens.val_fraction",
    "vocab": "tokens.vocab_size",
    "warmup": "optim.warmup_steps",
}


def _meant(key: str) -> str:
    """The field that is most likely meant by `key`, by another name, in another table or misspelled."""
    tables = get_type_hints(Recipe)
    fields = [f"{table}.{name}" for table, kind in tables.items() for name in get_type_hints(kind)]
    table, _, last = key.rpartition(".")
    word = last.lower().replace("-", "_")
    own = [name for name in fields if name.startswith(f"{table}.")] if table in tables else []
    by_name = [name for name in fields if name.partition(".")[2] == word]
    near = difflib.get_close_matches(f"{table}.{word}", own, n=1, cutoff=0.75) if own else []
    found = [*near, *by_name, *([ALIASES[word]] if word in ALIASES else [])]
    found = found or difflib.get_close_matches(key, own or [*tables, *fields], n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
