"""Why a file cannot be read: what is wrong with this machine or this reader is never called damage."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import complains
from tables import ALL, arrow, big_window, parquet, written

from prepare.text import rows
from prepare.text.documents import read
from shards import ConfigError, CorruptError, HostError

each_format = pytest.mark.parametrize("name", ALL)


@each_format
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = written(tmp_path, name, ALL[name]({"text": ["a"]}))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)  # root may read everything
    monkeypatch.setattr(pa, "OSFile", refused)
    monkeypatch.setattr(pq, "ParquetFile", refused)
    with pytest.raises(HostError, match=r"cannot be read: Permission denied"):
        list(read(path, 0, 1, "text"))


@pytest.mark.parametrize("name", ["plain.parquet", "a.jsonl", "a.csv", "a.txt", "stream.arrow"])
def test_memory_that_runs_out_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = written(tmp_path, name, ALL[name]({"text": ["a"]}))

    def full(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    for target, attribute in ((Path, "open"), (pa, "OSFile"), (pq, "ParquetFile")):
        monkeypatch.setattr(target, attribute, full)
    with pytest.raises(HostError, match="memory ran out while it was read"):
        list(read(path, 0, 1, "text"))


@pytest.mark.parametrize("error", [pa.ArrowNotImplementedError("no kernel"), pa.ArrowCapacityError("2 GiB")])
def test_what_pyarrow_does_not_know_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    table = pa.table({"text": ["a"]})
    paths = [written(tmp_path, "a.parquet", parquet(table)), written(tmp_path, "a.arrow", arrow(table))]

    def unknown_type(_: object) -> None:
        raise error

    monkeypatch.setattr(rows, "_flat", unknown_type)
    for path in paths:
        with pytest.raises(ConfigError, match=r"pyarrow [\d.]+ cannot read it: (no kernel|2 GiB)"):
            list(read(path, 0, 1, "text"))


def test_a_window_that_does_not_fit_in_memory(tmp_path: Path) -> None:
    """In a process that may take 512 MiB more than it has."""
    written(tmp_path, "a.jsonl.zst", big_window(b'{"text": "a"}\n'))
    code = """
import resource, sys
from pathlib import Path
from prepare.text.documents import read
from shards import HostError
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20), -1))
try:
    list(read(Path(sys.argv[1]), 0, 1, "text"))
except HostError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.jsonl.zst"], capture_output=True, text=True, check=False
    )
    assert "memory ran out while it was read (its window takes 1,073,741,824 bytes" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("kind", "at"), [(pa.string(), 4), (pa.large_string(), 8), (pa.binary(), 4), (pa.string_view(), 28)]
)
def test_arrow_that_leads_outside_of_its_memory(tmp_path: Path, kind: pa.DataType, at: int) -> None:
    """Arrow itself would read there, and the process end with a segmentation fault."""
    column = pa.array(["some text that is long"] * 3).cast(kind)
    places = column.buffers()[1].to_pybytes()
    forged = places[:at] + b"\xff\xff\xff\x7f" + places[at + 4 :]
    for text, changes in ((column, places), (pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), column), places)):
        data = arrow(pa.table({"text": text}))
        assert data.count(changes) == 1
        with complains(CorruptError, "a.arrow"):
            list(read(written(tmp_path, "a.arrow", data.replace(changes, forged)), 0, 1, "text"))


def test_arrow_with_an_index_outside_of_its_dictionary(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 7]), pa.array(["a", "b"]), safe=False)
    with complains(CorruptError, "a.arrow"):
        list(read(written(tmp_path, "a.arrow", arrow(pa.table({"text": column}))), 0, 1, "text"))
