"""Real text for every test: the standard library's own docstrings, which every Python has."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import TINY, prepared, stdlib_texts

from pipeline.cli.main import SPINS
from pipeline.config import load
from shards.sharing import retry

ROOT = Path(__file__).parent.parent
os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the command does, before torch is loaded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with several sets of parameters, the first is in the fast tier, the others are slow."""
    seen: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in seen:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is asked at once."""
    monkeypatch.setattr(retry, "BACKOFF", 0.001)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that lies beside the checkout on development machines."""
    path = ROOT.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("needs ../shared/data, which only development machines have")
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 2,000 real documents, 1 MB."""
    return stdlib_texts()


@pytest.fixture(scope="session")
def corpus_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tiny_toml(corpus_file: Path) -> Path:
    path = corpus_file.with_name("tiny.toml")
    path.write_text(TINY.format(files=corpus_file))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed token folder of several parts. Tests that change files copy it first."""
    return prepared(load(str(tiny_toml))[1], tmp_path_factory.mktemp("home"))


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Path]:
    """Prepare `files` with the settings given, under a home of this test's own; returns the token folder."""

    def run(*files: Path, home: str = "home", **settings: object) -> Path:
        names = json.dumps([str(file) for file in files])
        toml = tmp_path / "recipe.toml"
        toml.write_text(f'[corpus]\nkind = "files"\nfiles = {names}\n[tokens]\nworkers = 1\n')
        chosen = tuple(f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items())
        return prepared(load(str(toml), chosen)[1], tmp_path / home)

    return run
