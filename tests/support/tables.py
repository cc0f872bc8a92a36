"""The same rows as a file of every format, compressed and not, and the documents that come out of one."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from prepare.text.documents import read
from prepare.text.filters import parse_filters
from prepare.text.formats import FORMATS, kind_of
from prepare.text.rows import open_parquet
from shards.manifest import Counts

Table = dict[str, list[Any]]


def separated(table: Table, delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return out.getvalue().encode()


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def arrow_of(table: Table, kind: Any = None) -> pa.Table:
    if kind == "dictionary":
        return pa.table({**table, "text": pa.array(table["text"], pa.string()).dictionary_encode()})
    return pa.table({**table, "text": pa.array(table["text"], kind)} if kind else table)


def extension_of(table: Table) -> pa.Table:
    """Text that is said to be JSON, as a type of Arrow's own."""
    text = pa.array(table["text"], pa.string())
    return pa.table({**table, "text": pa.ExtensionArray.from_storage(pa.json_(pa.string()), text)})


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def arrow(table: pa.Table, make: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    out = io.BytesIO()
    with make(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


ROWS: dict[str, Callable[[Table], bytes]] = {
    "plain.parquet": lambda table: parquet(arrow_of(table)),
    "dictionary.parquet": lambda table: parquet(arrow_of(table, "dictionary")),
    "large.parquet": lambda table: parquet(arrow_of(table, pa.large_string())),
    "view.parquet": lambda table: parquet(arrow_of(table, pa.string_view())),
    "binary.parquet": lambda table: parquet(arrow_of(table, pa.binary())),
    "large_binary.arrow": lambda table: arrow(arrow_of(table, pa.large_binary())),
    "view.arrow": lambda table: arrow(arrow_of(table, pa.string_view())),
    "extension.parquet": lambda table: parquet(extension_of(table)),
    "extension.arrow": lambda table: arrow(extension_of(table)),
    "stream.arrow": lambda table: arrow(arrow_of(table)),
    "file.arrow": lambda table: arrow(arrow_of(table), pa.ipc.new_file),
    "dictionary.arrow": lambda table: arrow(arrow_of(table, "dictionary")),
    "a.jsonl": lambda table: "".join(json.dumps(row) + "\n" for row in rows_of(table)).encode(),
    "a.json": lambda table: json.dumps(rows_of(table)).encode(),
    "lines.json": lambda table: "".join(json.dumps(row) + "\n" for row in rows_of(table)).encode(),
    "a.csv": lambda table: separated(table, ","),
    "a.tsv": lambda table: separated(table, "\t"),
}
DOCUMENTS: dict[str, Callable[[Table], bytes]] = {
    f"a{kind}": lambda table: table["text"][0].encode() for kind in (".txt", ".md")
}
ALL = {**ROWS, **DOCUMENTS}
TEXTUAL = [name for name in ALL if FORMATS[kind_of(name)].compressible]
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def big_window(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=30, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


def documents(path: Path, filters: Sequence[str] = (), column: str = "text") -> tuple[list[str], Counts]:
    last = open_parquet(path, [column]).num_row_groups if path.suffix == ".parquet" else path.stat().st_size
    texts: list[str] = []
    counts = Counts()
    for batch in read(path, 0, last, column, parse_filters(filters)):
        texts += batch.texts
        counts = counts.plus(batch.counts)
    return texts, counts


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
