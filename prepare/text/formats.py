"""The formats of text: each suffix once, and what everything else needs to know of it."""

from pathlib import Path
from typing import Literal, NamedTuple

from shards.errors import ConfigError
from shards.interop import SUFFIXES as TOKEN_SUFFIXES


class Format(NamedTuple):
    """How files of one suffix are cut into parts, whether they may be compressed as a whole, and about how many bytes
    of such a file, uncompressed, become one token."""

    cut: Literal["row groups", "bytes", "never"]
    compressible: bool
    bytes_per_token: float


FORMATS = {
    ".parquet": Format("row groups", False, 2.9),  # of FineWeb's, compressed inside
    ".jsonl": Format("bytes", True, 4.4),
    ".json": Format("never", True, 4.4),
    ".csv": Format("never", True, 4.4),
    ".tsv": Format("never", True, 4.4),
    ".txt": Format("never", True, 4.4),
    ".md": Format("never", True, 4.4),
    ".arrow": Format("never", False, 4.4),
}
_SHARES = {".gz": 0.37, ".bz2": 0.28, ".xz": 0.27, ".zst": 0.35}  # of 44 MB of mixed text, at each one's own level
COMPRESSED = tuple(_SHARES)
_HINTS = {
    **dict.fromkeys((".html", ".htm", ".xml", ".warc"), "extract the text first, for example with trafilatura"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".epub", ".odt"), "convert it to .txt or .md, for example with pandoc"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack the archive, and name the files in it"),
    **dict.fromkeys((".xlsx", ".xls"), "save the sheet as .csv"),
    ".ndjson": "rename it to .jsonl",
    ".feather": "rename it to .arrow",
}


def kind_of(name: str) -> str:
    """The suffix that says how a file is read, compression aside; "" when documents cannot be read from it."""
    plain = name
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    kind = Path(plain).suffix
    found = FORMATS.get(kind)
    return kind if found and (plain == name or found.compressible) else ""


def cut_of(name: str) -> Literal["row groups", "bytes", "never"]:
    """Along what a file of that name is cut into parts; a compressed stream never is."""
    return FORMATS[kind_of(name)].cut if kind_of(name) and not name.endswith(COMPRESSED) else "never"


def bytes_per_token(name: str) -> float:
    """About how many bytes of the file become one token."""
    return FORMATS[kind_of(name)].bytes_per_token * _SHARES.get(Path(name).suffix, 1)


def unknown(where: str, name: str) -> ConfigError:
    """The error for a file that can be read neither as text nor as tokens."""
    plain = [suffix for suffix, each in FORMATS.items() if each.compressible]
    in_capitals = "rename it, with its suffix in lower case" if kind_of(name.lower()) else ""
    hint = in_capitals or _HINTS.get(Path(name).suffix.lower(), "choose others with corpus.files, or convert it")
    return ConfigError(
        f"{where}{name}: unknown kind of file",
        f"text is read from {', '.join(FORMATS)} ({', '.join(plain)} also with {', '.join(COMPRESSED)}), tokens from "
        f"{', '.join(TOKEN_SUFFIXES)}",
        hint,
    )
