"""sha256 of the canonical JSON of everything that determines a stage's output, and of nothing else."""

import hashlib
import math
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import inspect

from shards.errors import ConfigError


class Difference(NamedTuple):
    """One field in which what was asked differs from what is there."""

    field: str
    before: Any
    now: Any


def fingerprint(value: Any) -> str:
    """64 hex digits. ConfigError for a number that JSON cannot hold."""
    builtins = msgspec.to_builtins(value)
    _require_finite(builtins)
    return hashlib.sha256(msgspec.json.encode(builtins, order="deterministic")).hexdigest()


def identity(config: msgspec.Struct) -> dict[str, Any]:
    """The fields of a config that can change the result: all but those whose Meta says `identity: False`."""
    info = cast("inspect.StructType", inspect.type_info(type(config)))
    return {
        field.name: msgspec.to_builtins(getattr(config, field.name))
        for field in info.fields
        if not (isinstance(field.type, inspect.Metadata) and (field.type.extra or {}).get("identity") is False)
    }


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[Difference]:
    """The leaves in which two nested dictionaries differ, named table.field."""
    found: list[Difference] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(Difference(prefix + key, old, new))
    return found


def _require_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} is no number to make a fingerprint of")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _require_finite(item)
