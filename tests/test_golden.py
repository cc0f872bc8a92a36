"""What commit 1e9ff52 wrote is opened, verified, resumed, evaluated and sampled from by every version after it.

`golden/` was made by it on a CPU: a vocabulary of 300 from texts.jsonl (in a file, because the fingerprint
of a trained one has the trainer's version in it), then `millpond train golden.toml`, `evaluate` and `sample`.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import pytest
from click.testing import CliRunner, Result
from harness import results, tree
from msgspec import Meta

from pipeline import config
from pipeline.cli.main import main
from pipeline.home import runs
from pipeline.home.layout import Layout
from shards import RefusedError
from shards.fingerprint import fingerprint
from train.config import TrainConfig
from train.state import checkpoint as checkpoints

GOLDEN = Path(__file__).with_name("golden")
CLOSE = 1e-5  # relative
ON_THE_CPU = ("--set", "train.device=cpu")  # where the golden rows were made
RUN = Path("data/runs/golden")
TOKENS = Path("data/tokens/golden-d12a8001")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden files' paths are relative to their folder; each test works in a copy."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def stop_in_the_middle() -> None:
    """As if the run had been killed after its checkpoint of step 3."""
    shutil.rmtree(RUN / "checkpoints" / "step-000006")
    (RUN / "receipt.json").unlink()


def edit_recipe(old: str, new: str) -> None:
    text = (RUN / "run.toml").read_text()
    assert text.count(old) == 1
    (RUN / "run.toml").write_text(text.replace(old, new))


def like(golden: dict[str, Any]) -> dict[str, Any]:
    return golden | {key: pytest.approx(value, rel=CLOSE) for key, value in golden.items() if isinstance(value, float)}


def test_everything_is_known_to_be_done() -> None:
    before = tree(Path("data"))
    lines = run("train", "golden.toml", *ON_THE_CPU).stderr.splitlines()
    assert [line.split()[0] for line in lines if line.endswith(", already done")] == [
        "fetch",
        "tokenize",
        "verify",
        "train",
    ]
    assert {name: data for name, data in tree(Path("data")).items() if not name.startswith("locks/")} == before


def test_the_token_folder_is_verified_and_used() -> None:
    before = tree(TOKENS)
    shutil.rmtree("data/receipts")
    lines = run("prepare", "golden.toml").stderr.splitlines()
    assert any(line.startswith("tokenize  golden-d12a8001") and line.endswith(", already done") for line in lines)
    assert any(line.startswith("verify") and line.endswith("every byte as it was written") for line in lines)
    assert tree(TOKENS) == before and [path.name for path in TOKENS.parent.iterdir()] == [TOKENS.name]


def test_the_same_tokens_are_made_again() -> None:
    before = tree(TOKENS)
    shutil.rmtree(TOKENS)
    run("prepare", "golden.toml")
    assert tree(TOKENS) == before


def test_the_run_is_resumed_to_the_same_end() -> None:
    rows, samples = results(RUN / "metrics.jsonl"), results(RUN / "samples.jsonl")
    stop_in_the_middle()
    said = run("train", "golden.toml", *ON_THE_CPU).stderr
    assert " 3/6 " not in said and " 4/6 " in said
    for found, golden in zip(results(RUN / "metrics.jsonl"), rows, strict=True):
        assert {key: found.get(key) for key in golden} == like(golden)
    asked = [(row["step"], row["prompt"]) for row in results(RUN / "samples.jsonl")]
    assert asked == [(row["step"], row["prompt"]) for row in samples]
    assert {path.name for path in (RUN / "checkpoints").glob("step-*")} == {"step-000003", "step-000006"}


def test_what_is_not_repeated_is_kept() -> None:
    """With another cadence the resumed step is not evaluated again, nor sampled from."""
    rows, samples = results(RUN / "metrics.jsonl"), results(RUN / "samples.jsonl")
    stop_in_the_middle()
    run("train", "golden.toml", *ON_THE_CPU, "--set", "train.eval_every=0", "--set", "train.sample_every=0")
    evaluated = [row["step"] for row in results(RUN / "metrics.jsonl") if "val_loss" in row]
    assert evaluated == [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    assert [row["step"] for row in results(RUN / "samples.jsonl")] == [row["step"] for row in samples]


def test_the_run_is_evaluated_and_sampled_from() -> None:
    golden = json.loads((RUN / "evaluation.json").read_text())["result"]
    (RUN / "evaluation.json").unlink()
    for options in ((), ("--best",)):
        run("evaluate", "golden", "--device", "cpu", *options)
        found = json.loads((RUN / "evaluation.json").read_text())["result"]
        assert {key: found.get(key) for key in golden} == like(golden)
        assert run("sample", "golden", "--device", "cpu", "--prompt", "The", *options).stdout.startswith("The")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> type[TrainConfig]:
    """A later version: [train] has one more field, whose default is not what was done before."""

    class Later(TrainConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        z_loss: Annotated[float, Meta(ge=0, extra={"neutral": 0.0})] = 1e-4

    class Recipe(config.Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
        train: Later = Later()

    monkeypatch.setattr(config, "Recipe", Recipe)
    monkeypatch.setattr("train.config.TrainConfig", Later)
    return Later


def test_a_later_version_with_a_new_field(later: type[TrainConfig]) -> None:
    layout = Layout(Path("data"))
    golden = layout.run("golden")
    recipe, pinned = config.load_run(golden.recipe), runs.pinned(golden)
    assert isinstance(recipe.train, later) and recipe.train.z_loss == 0
    saved = checkpoints.load_latest(golden.checkpoints)
    assert saved and fingerprint(runs.identity_of(recipe, pinned)) == saved.progress.recipe
    runs.job(layout, golden, recipe, pinned).require_same_recipe(saved.progress)

    asked = config.load("golden.toml")[1]
    with pytest.raises(RefusedError, match=r"made with another recipe:\n  train\.z_loss: 0\.0 -> 0\.0001\n"):
        runs.refuse_drift(golden, runs.identity_of(asked, pinned))
    runs.refuse_drift(golden, runs.identity_of(config.load("golden.toml", ("train.z_loss=0",))[1], pinned))
    run("train", "golden.toml", *ON_THE_CPU, code=1)
    stop_in_the_middle()
    run("train", "golden.toml", *ON_THE_CPU, "--set", "train.z_loss=0")
    run("evaluate", "golden")
    edit_recipe("kwh_price = 0.0", "kwh_price = 0.0\nz_loss = 0.5")
    assert "than the run's:\n  train.z_loss: 0.0 -> 0.5\n" in run("evaluate", "golden", code=1).stderr


def test_what_was_edited_since_is_refused_by_its_hash() -> None:
    """The golden checkpoints have nothing else."""
    edit_recipe("clip = 1.0", "clip = 2.0")
    for said in (
        run("evaluate", "golden", code=1),
        run("sample", "golden", code=1),
        run("train", "golden.toml", *ON_THE_CPU, "--set", "optim.clip=2.0", code=1),
    ):
        assert "step 6 was made with another recipe than the run's:\n  sha256 74b5e9782a8c… -> " in said.stderr


def test_what_was_edited_since_is_refused_by_its_fields() -> None:
    stop_in_the_middle()
    run("train", "golden.toml", *ON_THE_CPU)
    (RUN / "receipt.json").unlink()
    edit_recipe("clip = 1.0", "clip = 2.0")
    edit_recipe("batch_ramp = []", "batch_ramp = [32]")
    changed = ("--set", "optim.clip=2.0", "--set", "train.batch_ramp=[32]")
    for said in (
        run("evaluate", "golden", code=1),
        run("sample", "golden", code=1),
        run("train", "golden.toml", *ON_THE_CPU, *changed, code=1),
    ):
        assert "step 6 was made with another recipe than the run's:\n  optim.clip: 1.0 -> 2.0\n" in said.stderr
        assert "  train.batch_ramp: [] -> (32,)\nrun.toml or tokens.json was edited" in said.stderr
