"""Every fault of the network, once, twice and for ever, in a first prepare and in one that grows what is there.

It ends in the right bytes or in exit 6; and once the network is well the same prepare ends in the right bytes. Between
the first and the growing one main moves, and the pinned commit stays."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TINY, litter, parquet, prepared, tree
from local_hub import Fault, LocalHub

from pipeline.config import load
from prepare.corpus import download as downloading
from shards import Manifest, NetworkError

FILES = 3
FAULTS = {
    **{f"{kind} from the cdn": (kind, "cdn", "0") for kind in ("404", "429", "503")},
    **{f"{kind} from the hub": (kind, "resolve", "0") for kind in ("401", "500", "redirect-loop")},
    **{f"{kind} for a listing": (kind, "api", "0") for kind in ("429", "503")},
    **{kind: (kind, "cdn", "0") for kind in ("cut", "stall", "html", "flip", "length", "ignore-range")},
    **{f"wait {after}": ("429", "cdn", after) for after in ("soon", "1e9", "Thu, 01 Jan 1970 00:00:00 GMT")},
}
HARMLESS = {"ignore-range"}  # the whole file comes, which is what is wanted
Prepare = Callable[..., Path]


@pytest.fixture
def hub(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        monkeypatch.setattr(downloading, "timeout_seconds", lambda: 0.2)
        monkeypatch.setattr(downloading, "MAX_WAIT", 0.01)
        local.commit("org/web", {f"sample/{i}.parquet": parquet(texts[i * 40 : i * 40 + 40]) for i in range(FILES)})
        yield local


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toml = TINY.replace('kind = "files"', 'kind = "hub"\nrepo = "org/web"').format(files="sample/*.parquet")
    path = tmp_path_factory.mktemp("recipe") / "web.toml"
    path.write_text(toml.replace('"bpe"\nvocab_size = 512', '"gpt2"').replace("40_000", "4_000"))
    return path


@pytest.fixture
def prepare(recipe: Path, tmp_path: Path) -> Prepare:
    def run(*settings: str, home: str = "home") -> Path:
        return prepared(load(str(recipe), settings)[1], tmp_path / home)

    return run


right: dict[str, bytes] = {}


def check(prepare: Prepare, hub: LocalHub, folder: Path, home: Path) -> None:
    """The folder is that of an undisturbed prepare of the first commit, and nothing else is left."""
    if not right:
        right.update(tree(prepare(f"corpus.revision={next(iter(hub.repos['org/web']))}", home="calm")))
    assert tree(folder) == right
    assert not litter(home)
    assert Manifest.read(folder).corpus.details["commit"] == next(iter(hub.repos["org/web"]))


@pytest.mark.parametrize(("times", "grown"), [(1, False), (-1, True)], ids=["once-first", "always-grown"])
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault(hub: LocalHub, prepare: Prepare, tmp_path: Path, name: str, times: int, grown: bool) -> None:
    kind, where, retry_after = FAULTS[name]
    if grown:
        prepare("tokens.max_tokens=2000")
        hub.commit("org/web", {"sample/0.parquet": parquet(["main has moved"] * 99)})
    hub.faults = [Fault(kind, times, where, retry_after)]
    try:
        folder = prepare()
    except NetworkError as error:
        assert error.exit_code == 6
        assert "hint: " in str(error)
        hub.faults = []
        folder = prepare()
    else:
        assert times > 0 or kind in HARMLESS or kind == "cut" or (where == "api" and grown)
    hub.faults = []
    check(prepare, hub, folder, tmp_path / "home")
