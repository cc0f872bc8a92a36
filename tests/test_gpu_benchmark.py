"""make bench-gpu: the small model of it, on whatever device there is."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apart import Failed, apart

GPU = Path(__file__).parent / "benchmarks" / "gpu.py"


def bench(corpus_file: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = (f"corpus.files={corpus_file}", "tokens.tokenizer=bpe", "tokens.vocab_size=512", "tokens.workers=1")
    settings += ("train.compile=off",)
    command = [sys.executable, "-P", str(GPU), "--small", "--home", str(home), "--results", str(home / "results.jsonl")]
    command += [word for each in settings for word in ("--set", each)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_parts_are_measured_and_a_spent_budget_measures_nothing(corpus_file: Path, tmp_path: Path) -> None:
    done = bench(corpus_file, tmp_path, "--part", "smoke", "loader")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["part"], row["measurement"]) for row in rows] == [
        ("smoke", "compiled against eager"),
        ("loader", "loader"),
        ("loader", "resident batch"),
        ("loader", "loader, files not cached"),
    ]
    assert all({"date", "card", "driver", "torch", "cuda", "command"} <= row.keys() for row in rows)
    assert rows[0]["loss_difference_most"] == 0
    assert all(row["step_ms"] > 0 for row in rows[1:])
    assert "slower_percent" in rows[1] and "slower_percent" not in rows[2]
    assert "| measurement | tok_per_s |" in done.stdout
    none = bench(corpus_file, tmp_path, "--part", "loader", "--budget", "0")
    assert none.returncode == 0, none.stderr
    assert "left out: loader, loading: takes about 60 s" in none.stdout
    assert (tmp_path / "results.jsonl").read_text().count("\n") == len(rows)


def test_what_outlasts_its_time_or_fails_is_reported() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        apart(0.1, time.sleep, 60)
    assert time.monotonic() - began < 30
    with pytest.raises(Failed, match="ValueError"):
        apart(60, int, "no number")
    with pytest.raises(Failed, match="exit code 3"):
        apart(60, sys.exit, 3)
    assert apart(60, int, "7") == 7
