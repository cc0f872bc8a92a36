"""Where things are under one home, for all verbs alike."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.home.layout import Layout


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_all_verbs(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb, config in (("plan", str(tiny_toml)), ("train", str(tiny_toml)), ("evaluate", "tiny")):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        settings = () if verb == "evaluate" else ("--set", "train.steps=1")
        assert CliRunner().invoke(main, [verb, config, "--home", str(tmp_path), *settings]).exit_code == 0
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == str(tmp_path / "compiled"), verb
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    Layout(tmp_path).keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_nothing_is_kept_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch fails in a folder that it cannot make, even where nothing is compiled."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "compiled").write_text("no folder")
    Layout(tmp_path).keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
