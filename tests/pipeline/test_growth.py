"""A run that was started on a folder sees what it saw then, however much the folder has grown since."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from shards import Manifest
from train import loop
from train.session import Output, Session
from train.telemetry.metrics import read_rows


class Stopped(BaseException):
    pass


@pytest.mark.slow
def test_a_run_goes_on_after_its_folder_grew(tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def millpond(verb: str, home: str, tokens: int) -> None:
        asked = [verb, str(tiny_toml), "--home", str(tmp_path / home), "--set", f"tokens.max_tokens={tokens}"]
        result = CliRunner().invoke(main, asked, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    millpond("train", "calm", 60_000)
    save = loop._save

    def stop(run: Session, out: Output) -> None:
        save(run, out)
        if run.state.step == 30:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "_save", stop)
        millpond("train", "grown", 60_000)
    millpond("prepare", "grown", 0)
    (folder,) = (tmp_path / "grown" / "tokens").iterdir()
    (small,) = (tmp_path / "calm" / "tokens").iterdir()
    assert len(Manifest.read(folder).parts) > len(Manifest.read(small).parts)
    millpond("train", "grown", 0)
    runs = [tmp_path / home / "runs" / "tiny" for home in ("calm", "grown")]
    rows = [read_rows(run / "metrics.jsonl") for run in runs]
    losses = [[(row["step"], row.get("loss"), row.get("val_loss")) for row in found] for found in rows]
    assert losses[0] == losses[1]
    assert losses[0][-1][0] == 60
