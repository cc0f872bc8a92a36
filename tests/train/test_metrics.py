"""metrics.jsonl after a kill or a power cut: what a checkpoint needs is there, and what came after it is cut."""

from pathlib import Path

import pytest
from harness import complains

from shards import CorruptError
from train.telemetry.metrics import RowLog, read_rows


def line(step: int) -> bytes:
    return b'{"step":%d,"loss":1.5}\n' % step


def resumed(path: Path, last_step: int) -> list[int]:
    with RowLog(path, last_step, "val_loss") as log:
        log.write({"step": last_step + 1, "loss": 1.0})
        log.sync()
    return [row["step"] for row in read_rows(path)]


HOLES = {
    "a page of zeros": b"\0" * 4096 + b"\n",
    "zeros without an end": b"\0" * 512,
    "half a row": b'{"step":3,"lo\n',
    "not UTF-8": b"\xff\xfe\n",
    "another value": b"[1]\n",
    "no step": b"{}\n",
    "a carriage return": b'\r{"step"\r\n',
    "nothing": b"\n",
}


@pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES)
def test_what_comes_after_the_checkpoint_is_cut_whatever_it_is(tmp_path: Path, hole: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    for after in (hole, hole + line(4), hole + hole + line(5) + hole, line(3) + hole + line(6) + line(7)):
        path.write_bytes(line(1) + line(2) + after)
        assert resumed(path, 2) == [1, 2, 3]


@pytest.mark.parametrize("hole", [hole for hole in HOLES.values() if hole.endswith(b"\n")])
def test_what_a_checkpoint_needs_is_not_passed_over(tmp_path: Path, hole: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    before = line(1) + hole + line(2) + line(3)
    path.write_bytes(before)
    with complains(CorruptError, "metrics.jsonl", "line 2"):
        RowLog(path, 2, "")
    assert path.read_bytes() == before


def test_rows_out_of_order_and_rows_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(3) + line(2) + line(2) + line(4))
    assert resumed(path, 2) == [1, 2, 2, 3]


def test_files_without_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert resumed(path, 0) == [1]
    path.write_bytes(b"")
    assert resumed(path, 0) == [1]
    path.write_bytes(line(1).rstrip())  # cut in its end
    assert resumed(path, 0) == [1]
