"""Which files a pattern names: on this disk and on the Hub the same."""

import os
from pathlib import Path

import pytest
from harness import complains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prepare.corpus.files import ListedTree, LocalTree, fixed_folder, listed_files, local_files, matching
from prepare.text.formats import kind_of
from shards import ConfigError, HostError

PATHS = [
    "a.txt",
    "b1.txt",
    "x/a.txt",
    "x/y/a.txt",
    "x/y/z/b.md",
    ".hidden/a.txt",
    "x/.a.txt",
    "w[1].txt",
    "x/[a]/b.txt",
]


def named(pattern: str, paths: list[str] = PATHS) -> list[str]:
    return sorted({path for path in matching(pattern, ListedTree(paths)) if path in paths})


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["a.txt", "b1.txt", "w[1].txt"]),
        ("**/*.txt", ["a.txt", "b1.txt", "w[1].txt", "x/[a]/b.txt", "x/a.txt", "x/y/a.txt"]),
        ("x/**/a.txt", ["x/a.txt", "x/y/a.txt"]),
        ("x/*/a.txt", ["x/y/a.txt"]),
        ("x/**", ["x/[a]/b.txt", "x/a.txt", "x/y/a.txt", "x/y/z/b.md"]),
        ("**/y/**/*", ["x/y/a.txt", "x/y/z/b.md"]),
        ("?.txt", ["a.txt"]),
        ("x?a.txt", []),
        ("[ab]*.txt", ["a.txt", "b1.txt"]),
        ("[!a]*.txt", ["b1.txt", "w[1].txt"]),
        ("w[1].txt", ["w[1].txt"]),
        ("x/[a]/*.txt", ["x/[a]/b.txt"]),
        (".hidden/*", [".hidden/a.txt"]),
        (".*/*.txt", [".hidden/a.txt"]),
        ("x/.*", ["x/.a.txt"]),
        ("./x//a.txt", ["x/a.txt"]),
        ("A.txt", []),
    ],
)
def test_patterns(pattern: str, found: list[str]) -> None:
    assert named(pattern) == found


names = st.sampled_from(["a", "b", "ab", "a.txt", "b.txt", ".a", "[a]", "c[1].txt", "x y"])
paths = st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), min_size=1, max_size=8, unique=True)
parts = st.sampled_from(["a", "b", "*", "**", "?", "[a]", "[ab]*", "*.txt", "a*", ".*", "c[1].txt", "[!a]*", "x*"])
patterns = st.lists(parts, min_size=1, max_size=4).map("/".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=paths, pattern=patterns)
def test_the_hub_and_the_disk_agree(tmp_path_factory: pytest.TempPathFactory, paths: list[str], pattern: str) -> None:
    root = tmp_path_factory.mktemp("tree")
    kept = []
    for path in paths:
        try:  # a name cannot be a file and a folder
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch(exist_ok=False)
            kept.append(path)
        except (FileExistsError, NotADirectoryError):
            pass
    listed = {path for path in matching(pattern, ListedTree(kept)) if path in kept}
    local = {os.path.relpath(path, root) for path in matching(f"{root}/{pattern}", LocalTree()) if Path(path).is_file()}
    assert listed == local
    assert all(path.startswith(fixed_folder(pattern)) for path in listed)


def test_each_folder_behind_links_is_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to(".", target_is_directory=True)
    (tmp_path / "A first").symlink_to("a/b", target_is_directory=True)
    assert LocalTree().below(str(tmp_path)) == [str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a/b"]


def test_only_a_link_leads_there(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("../elsewhere", target_is_directory=True)
    found = local_files((f"{tmp_path}/data/**/*.txt",), "corpus.files", lambda name: ".txt")
    assert [*found.files.values()] == [tmp_path / "data" / "linked" / "a.txt"] and not found.again


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refusing(path: str) -> object:  # root may read everything
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with complains(HostError, f"{tmp_path}/closed", "Permission denied"):
        local_files((f"{tmp_path}/**/*.txt",), "corpus.files", lambda name: ".txt")


def test_a_pattern_that_names_nothing_on_the_hub() -> None:
    with complains(ConfigError, "me/set", "data/*.csv", "a.txt", "b1.txt"):
        listed_files(("data/*.csv",), "corpus.files", PATHS, "me/set at 1", kind_of)
    with complains(ConfigError, "corpus.val_files", '"x/*.txt"'):
        listed_files(("x",), "corpus.val_files", PATHS, "me/set at 1", kind_of)
