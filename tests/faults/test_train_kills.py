"""A few points of `train_kills.py --count 200`, and a part of `rotten_checkpoints.py --count 1000`."""

import subprocess
import sys
from pathlib import Path

from rotten_checkpoints import CORRUPTIONS, rot

FOLDER = Path(__file__).parent


def test_killed_and_run_again_bit_for_bit() -> None:
    """In a process of its own, since it forks: there must be no thread in it."""
    arguments = [sys.executable, "-P", str(FOLDER / "train_kills.py"), "--count", "3"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of them killed" in done.stdout and " 0 different" in done.stdout


def test_nothing_rotten_is_loaded(tmp_path: Path) -> None:
    tried, faults = rot(60, 1, tmp_path)
    assert not faults
    assert len(tried) == len(CORRUPTIONS)
