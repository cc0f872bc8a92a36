"""A disk that fills up at any point, for real: a tmpfs of so many bytes. Exit 5, nothing half-published; once it has
grown, the same command ends in the same bytes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TINY, litter, millpond, parquet, pipeline_of, tree
from local_hub import LocalHub

from pipeline.config import load
from shards import Manifest, verify

NEEDS = re.compile(r"this needs about [\d,]+ bytes and [\d,]+ are free\n")
NO_SPACE = re.compile(r"cannot be \w+: No space left on device\n")
IS_ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Call it with tmpfs options (size=64k, ro …) to get the disk, and again to change it; at last it is unmounted."""
    if not IS_ROOT:
        pytest.skip("mounting needs root; test_in_a_namespace_of_our_own tries what else there is")
    home = tmp_path / "disk"
    home.mkdir()

    def with_options(options: str) -> Path:
        remount = "remount," if home.is_mount() else ""
        try:
            mount("-t", "tmpfs", "-o", remount + options, "millpond", home)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tmpfs cannot be mounted here: {error}")
        return home

    yield with_options
    if home.is_mount():
        subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.skipif(IS_ROOT, reason="root mounts directly")
def test_in_a_namespace_of_our_own() -> None:
    """The tests of this file once more, where `unshare` makes us root of a namespace."""
    inside = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    try:
        subprocess.run(["unshare", "-rm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"neither root nor unshare: {error}")
    done = subprocess.run(inside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def recipe(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:600]))
    (folder / "a.toml").write_text(TINY.format(files=folder / "a.jsonl").replace("40_000", "10_000"))
    return folder / "a.toml"


@pytest.fixture(scope="module")
def calm(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home where nobody disturbed the prepare."""
    home = tmp_path_factory.mktemp("calm")
    prepare(recipe, home)
    return home


def prepare(recipe: Path, home: Path, *settings: str) -> None:
    """In this process: starting another one is most of the time it takes."""
    pipeline_of(load(str(recipe), settings)[1], home).prepare()


def pages(home: Path) -> int:
    """What a tmpfs needs for `home`."""
    return sum(4096 * -(-len(data) // 4096) for data in tree(home).values())


def stopped_well(home: Path, done: subprocess.CompletedProcess[str], says: re.Pattern[str] = NEEDS) -> None:
    """It ended because the disk is full, said so and what to do, and what has a name is whole."""
    assert done.returncode == 5, done.stderr
    assert says.search(done.stderr), done.stderr
    assert "\nhint: free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(home.rglob(".*.tmp"))
    for manifest in home.glob("tokens/*/manifest.json"):
        assert verify(manifest.parent) == []


@pytest.mark.parametrize("tenths", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_full(recipe: Path, calm: Path, disk: Callable[[str], Path], tenths: int) -> None:
    home = disk(f"size={4096 + pages(calm) * tenths // 10}")
    done = millpond("prepare", recipe, "--home", home, "--set", f"tokens.workers={1 + tenths % 2}")
    stopped_well(home, done)
    kept = {name for name in tree(home / "tokens") if ".parts" not in name}
    disk("size=64m")
    prepare(recipe, home)
    assert tree(home / "tokens") == tree(calm / "tokens")
    assert not litter(home)
    assert kept <= set(tree(home / "tokens"))


@pytest.mark.parametrize("inodes", [2, 3, 8, 20])
def test_no_more_files(recipe: Path, calm: Path, disk: Callable[[str], Path], inodes: int) -> None:
    """A disk with room, and none for one more name; with 2 or 3 it is not known yet what tokenizing needs."""
    home = disk(f"size=64m,nr_inodes={inodes}")
    stopped_well(home, millpond("prepare", recipe, "--home", home), NO_SPACE if inodes < 8 else NEEDS)
    disk("nr_inodes=10000")
    prepare(recipe, home)
    assert tree(home / "tokens") == tree(calm / "tokens")
    assert not litter(home)


@pytest.fixture
def hub(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        local.commit("org/web", {f"sample/{i}.parquet": parquet(texts[i * 300 : (i + 1) * 300]) for i in range(2)})
        yield local


@pytest.fixture
def hub_recipe(recipe: Path) -> Path:
    toml = TINY.replace('kind = "files"', 'kind = "hub"\nrepo = "org/web"').format(files="sample/*.parquet")
    path = recipe.with_name("hub.toml")
    path.write_text(toml.replace("40_000", "10_000"))
    return path


@pytest.mark.parametrize("files", [0.5, 1.5])
def test_full_while_downloading(
    hub: LocalHub, hub_recipe: Path, disk: Callable[[str], Path], tmp_path: Path, files: float
) -> None:
    """A file needs its own size twice for a moment: its parts and the whole."""
    (first, *_) = next(iter(hub.repos["org/web"].values())).values()
    home = disk(f"size={4096 + int(len(first) * files)}")
    stopped_well(home, millpond("prepare", hub_recipe, "--home", home))
    disk("size=64m")
    prepare(hub_recipe, home)
    prepare(hub_recipe, tmp_path / "calm")
    assert tree(home / "tokens") == tree(tmp_path / "calm" / "tokens")
    assert not litter(home)


def test_a_disk_that_is_read_only(hub: LocalHub, hub_recipe: Path, disk: Callable[[str], Path]) -> None:
    """Found before anything is asked of the Hub."""
    disk("size=1m")
    home = disk("ro")
    done = millpond("prepare", hub_recipe, "--home", home)
    assert done.returncode == 3, done.stderr
    assert "--home DIR" in done.stderr
    assert not hub.log


def test_a_disk_that_becomes_read_only(recipe: Path, calm: Path, disk: Callable[[str], Path]) -> None:
    home = disk("size=64m")
    prepare(recipe, home, "tokens.max_tokens=20000")
    disk("size=64m,ro")
    assert millpond("prepare", recipe, "--home", home).returncode == 3
    disk("size=64m,rw")
    prepare(recipe, home)
    (folder,) = (home / "tokens").iterdir()
    assert Manifest.read(folder).complete
    assert tree(home / "tokens") == tree(calm / "tokens")
