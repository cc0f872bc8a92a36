"""sha256 of the canonical JSON of everything that determines a stage's output, and of nothing else.

What a field of a config means for it is in the field's Meta: `extra={"identity": False}` for one that cannot change the
result, `extra={"neutral": VALUE}` for one that was added later, VALUE being what the program did before.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import inspect

from shards.errors import ConfigError

NOT_IDENTITY = {"identity": False}  # marks a field of a config that cannot change the result


class Difference(NamedTuple):
    """One field in which what was asked differs from what is there."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"  {self.field}: {self.before} -> {self.now}"


def fingerprint(value: Any) -> str:
    """64 hex digits. ConfigError for a number that JSON cannot hold."""
    _require_finite(msgspec.to_builtins(value))
    return hashlib.sha256(_canonical(value)).hexdigest()


def identity(config: msgspec.Struct) -> dict[str, Any]:
    """The fields of a config that can change the result.

    A field at its neutral value is left out, so that what was made before the field existed keeps its fingerprint.
    """
    before, found = neutral(type(config)), {}
    for name, marks in _marks(type(config)).items():
        value = msgspec.to_builtins(getattr(config, name))
        if marks.get("identity") is not False and not (name in before and value == before[name]):
            found[name] = value
    return found


def neutral(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a config that were added later, each with what the program did before it existed."""
    marked = _marks(kind).items()
    return {name: msgspec.to_builtins(marks["neutral"]) for name, marks in marked if "neutral" in marks}


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[Difference]:
    """The leaves in which two nested dictionaries differ, named table.field.

    `absent` is nested as they are and has the value of a leaf that is left out; without one it is None.
    """
    absent, found = absent or {}, []
    for key in sorted(before.keys() | now.keys()):
        old, new = (each.get(key, absent.get(key)) for each in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, absent.get(key), f"{prefix}{key}.")
        elif _canonical(old) != _canonical(new):  # a tuple that was written comes back as a list
            found.append(Difference(prefix + key, old, new))
    return found


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(value), order="deterministic")


def _marks(kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """What the Meta of each field says beside its type."""
    fields = cast("inspect.StructType", inspect.type_info(kind)).fields
    return {
        field.name: (field.type.extra or {}) if isinstance(field.type, inspect.Metadata) else {} for field in fields
    }


def _require_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"a number of the recipe is non-finite: {value}",
            "JSON, of which the fingerprint is made, has no such number",
        )
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _require_finite(item)
