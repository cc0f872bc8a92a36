"""The ground floor: every byte format on disk, and nothing that needs more than numpy, msgspec and xxhash."""

from shards.errors import (
    ConfigError,
    CorruptError,
    DiskError,
    HostError,
    Interrupted,
    MillpondError,
    NetworkError,
    OutOfTime,
    RefusedError,
)
from shards.header import ShardHeader
from shards.manifest import Manifest
from shards.reader import Shard, TokenFolder, TokenStream
from shards.tokenizer import Tokenizer
from shards.verify import Finding, verify
from shards.writer import ShardWriter

__all__ = [
    "ConfigError",
    "CorruptError",
    "DiskError",
    "Finding",
    "HostError",
    "Interrupted",
    "Manifest",
    "MillpondError",
    "NetworkError",
    "OutOfTime",
    "RefusedError",
    "Shard",
    "ShardHeader",
    "ShardWriter",
    "TokenFolder",
    "TokenStream",
    "Tokenizer",
    "verify",
]
