"""A few kills of the storm that `kills.py --count 200` raises in full."""

import os
from pathlib import Path

import pytest
from kills import Storm, hub_recipe, local_recipe
from local_hub import LocalHub


@pytest.mark.slow
def test_killed_while_another_does_the_same(tmp_path: Path) -> None:
    storm = Storm(local_recipe(tmp_path), tmp_path, 1, {**os.environ})
    storm.rage(6)
    assert not storm.faults
    assert storm.kills >= 6 and storm.prepares >= 1


@pytest.mark.slow
def test_killed_while_downloading(tmp_path: Path) -> None:
    with LocalHub() as hub:
        storm = Storm(hub_recipe(tmp_path, hub), tmp_path, 2, {**os.environ, "HF_ENDPOINT": hub.url})
        storm.rage(3)
    assert not storm.faults
    assert storm.kills >= 3 and storm.prepares >= 1
