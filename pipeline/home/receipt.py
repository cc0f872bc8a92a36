"""Receipts: the small JSON file a stage writes last. A stage is finished when its receipt says so, for these inputs."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from shards.atomic import make_folder, publish_bytes
from shards.errors import MillpondError
from shards.manifest import decode, encode

VERSIONS_OF = ("millpond", "torch", "numpy", "pyarrow", "fastokens", "tiktoken", "tokenizers", "safetensors")


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stage did: the fingerprint of its inputs, what came out in numbers, with which versions, how long."""

    stage: str
    fingerprint: str
    result: dict[str, Any]
    versions: dict[str, str]
    seconds: float


def write(path: Path, stage: str, fingerprint: str, result: dict[str, Any], seconds: float) -> None:
    """Declare `stage` finished for the inputs of `fingerprint`. The caller holds the target's lock."""
    make_folder(path.parent)
    receipt = Receipt(
        stage=stage, fingerprint=fingerprint, result=result, versions=versions(), seconds=round(seconds, 3)
    )
    publish_bytes(path, encode(receipt))


def read(path: Path, fingerprint: str) -> Receipt | None:
    """The receipt, if there is a valid one for exactly these inputs."""
    if not path.exists():
        return None
    try:
        receipt = decode(path.read_bytes(), Receipt, path)
    except MillpondError:
        return None  # a damaged receipt proves nothing: the stage runs again
    return receipt if receipt.fingerprint == fingerprint else None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the result may depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
