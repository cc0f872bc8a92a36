"""What strangers send: a fiftieth of `hostile.py --count 1000000`, in a process whose memory is limited."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("hostile.py")


@pytest.fixture(scope="module")
def said() -> list[str]:
    arguments = [sys.executable, "-P", str(SCRIPT), "--count", "20000", "--seed", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert " tried, " in done.stdout, done.stderr
    return done.stdout.splitlines()


def test_nothing_foreign_is_raised(said: list[str]) -> None:
    assert not [line for line in said if line.startswith("FAULT") and "as manifest.json" not in line]


def test_a_manifest_that_is_no_file(said: list[str]) -> None:
    assert not [line for line in said if line.startswith("FAULT") and "as manifest.json" in line]


def test_both_answers_and_refusals_are_tried(said: list[str]) -> None:
    """A gate that refuses all, or believes all, would be one that tests nothing."""
    found = {line.strip().partition(" ")[2] for line in said}
    assert {
        f"{kind} {answer}" for kind in ("header", "manifest", "train", "docs.npy") for answer in ("accepted", "refused")
    } <= found
