"""Folders that travel come to the same bytes, or to an error that names the file; never to anything in between."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
from harness import complains, tree
from local_hub import Fault, LocalHub

from shards import CorruptError, Manifest, NetworkError, RefusedError, TokenFolder, verify
from shards.manifest import folder_name
from shards.numbers import size
from shards.sharing import progress, retry
from shards.sharing import storage as storages
from shards.sharing.card import card
from shards.sharing.sync import pull, push

# huggingface_hub hands files to its HTTP library in a way that the library no longer likes
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

MEMORY = "memory://bucket/tokens"
HUB = "hf://datasets/org/tokens"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        monkeypatch.setenv("MILLPOND_TRUST_ENDPOINT", "1")
        yield local


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def small(tiny_folder: Path, tmp_path: Path) -> Path:
    """The first part of the tiny folder, as it was before it grew."""
    folder = tmp_path / "small"
    folder.mkdir()
    manifest = Manifest.read(tiny_folder)
    manifest = msgspec.structs.replace(manifest, parts=manifest.parts[:1])
    for name, _ in manifest.files():
        shutil.copyfile(tiny_folder / name, folder / name)
    manifest.write(folder)
    return folder


def without_card(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "README.md"}


def url_of(kind: str, tmp_path: Path) -> str:
    return {"path": str(tmp_path / "there"), "file": f"file://{tmp_path}/there", "memory": MEMORY, "hub": HUB}[kind]


@pytest.mark.parametrize("kind", ["path", "file", "memory", "hub"])
def test_there_and_back(hub: LocalHub, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    url, here = url_of(kind, tmp_path), tmp_path / "here"
    push(tiny_folder, url, print)
    manifest = pull(url, here, print)
    assert without_card(here) == without_card(tiny_folder)
    assert (here / "README.md").read_text() == card(manifest, f"tiny-{manifest.fingerprint[:8]}")
    assert verify(here) == []
    assert TokenFolder(here).manifest == manifest == Manifest.read(tiny_folder)
    said: list[str] = []
    push(here, url, said.append)
    assert pull(url, here, said.append) == manifest
    assert [line.split(": ")[0] for line in said] == [url, str(here)] and f"{len(manifest.parts)} parts" in said[1]


def test_the_manifest_comes_last(tiny_folder: Path) -> None:
    push(tiny_folder, MEMORY, print)
    names = [path.rpartition("/")[2] for path in fsspec.filesystem("memory").store]  # in the order they came
    assert names[-2:] == ["README.md", "manifest.json"]
    assert set(names[:-2]) == {name for name, _ in Manifest.read(tiny_folder).files()}


def test_a_folder_in_a_dataset_at_a_commit(hub: LocalHub, tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    push(small, f"{HUB}/gpt2/small", print)
    commit = list(hub.repos["org/tokens"])[-1]
    push(tiny_folder, f"{HUB}/gpt2/small", print)
    assert len(pull(f"hf://org/tokens@{commit}/gpt2/small", tmp_path / "then", print).parts) == 1
    assert len(pull(f"{HUB}@main/gpt2/small/", tmp_path / "now", print).parts) > 1


def test_a_hub_that_never_answers_is_not_waited_for(
    hub: LocalHub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "COMMIT_SECONDS", 0.2)
    monkeypatch.setattr(retry, "SAID_SECONDS", 0.1)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with complains(NetworkError, HUB, "timed out", "5 times"):
            push(tiny_folder, HUB, said.append)
    assert len(said) == 4 and all(HUB in line for line in said)


def test_a_push_says_how_far_it_is(hub: LocalHub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    said: list[str] = []
    push(tiny_folder, HUB, said.append)
    lines = [line for line in said if line.startswith("sending: ")]
    whole = sum((tiny_folder / name).stat().st_size for name, _ in Manifest.read(tiny_folder).files())
    assert len(lines) > 2 and all(f" of {size(whole)}, " in line for line in lines)
    assert lines[-1].startswith(f"sending: {size(whole)} of ") and lines[-1].endswith("0:00 left")


def test_a_new_dataset_is_private(hub: LocalHub, tiny_folder: Path) -> None:
    push(tiny_folder, HUB, print)
    assert hub.visibility == {"org/tokens": "private"}


def test_the_token_goes_to_trusted_hosts_alone(
    hub: LocalHub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(tiny_folder, HUB, print)
    pull(HUB, tmp_path / "trusted", print)
    assert {asked.where for asked in hub.log if asked.authorization} == {"hub"}  # never the CDN
    assert {asked.where for asked in hub.log} == {"hub", "cdn"}
    hub.log.clear()
    monkeypatch.delenv("MILLPOND_TRUST_ENDPOINT")
    pull(HUB, tmp_path / "here", print)
    with complains(
        RefusedError,
        f"{HUB}: HF_ENDPOINT is {hub.url}, and a push would give it your token",
        "the token goes to the Hub's own hosts alone",
        "hint: set MILLPOND_TRUST_ENDPOINT=1 if you trust that host, or log out and unset HF_TOKEN",
    ):
        push(tiny_folder, HUB, print)
    assert not [asked for asked in hub.log if asked.authorization]


def test_after_sigkill_only_the_rest_is_fetched(hub: LocalHub, tiny_folder: Path, tmp_path: Path) -> None:
    push(tiny_folder, HUB, print)
    whole = sum(len(data) for name, data in tree(tiny_folder).items() if not name.endswith(".json"))
    code = (
        "import sys; from pathlib import Path; from shards.sharing import storage, sync as share;"
        "storage.CHUNK = 8192; share.pull(sys.argv[1], Path(sys.argv[2]), print)"
    )
    here = tmp_path / "here"
    hub.slow = 0.05
    for _ in range(2):
        before = hub.sent()
        process = subprocess.Popen([sys.executable, "-c", code, HUB, str(here)], stdout=subprocess.DEVNULL)
        while hub.sent() < before + whole // 5:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (here / "manifest.json").exists()
    hub.slow = 0.0
    pull(HUB, here, print)
    assert hub.sent() <= whole + 2 * 4 * 8192  # what was on its way when the kill came
    assert without_card(here) == without_card(tiny_folder)


@pytest.mark.parametrize("name", ["train-00001.bin", "val-00000.docs.npy", "tokenizer.tiktoken"])
def test_a_flipped_byte_on_the_other_side_is_found(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    push(tiny_folder, str(tmp_path / "there"), print)
    there, here = tmp_path / "there" / name, tmp_path / "here"
    data = there.read_bytes()
    there.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    expected = dict(Manifest.read(tiny_folder).files())[name]
    with pytest.raises(CorruptError) as caught:
        pull(str(tmp_path / "there"), here, print)
    assert f"{there}: 3 times the wrong bytes: got sha256 " in caught.value.what
    assert caught.value.what.endswith(f"expected {expected}")
    assert not (here / "manifest.json").exists()
    assert not (here / name).exists()
    there.write_bytes(data)
    pull(str(tmp_path / "there"), here, print)
    assert without_card(here) == without_card(tiny_folder)


def test_wrong_bytes_on_the_way_are_fetched_again(hub: LocalHub, tiny_folder: Path, tmp_path: Path) -> None:
    push(tiny_folder, HUB, print)
    hub.faults = [Fault("flip", 2), Fault("ignore-range", 1), Fault("503", 1)]
    pull(HUB, tmp_path / "here", print)
    assert without_card(tmp_path / "here") == without_card(tiny_folder)


def test_pulling_again_mends_what_was_damaged_here(tiny_folder: Path, tmp_path: Path) -> None:
    push(tiny_folder, MEMORY, print)
    here = tmp_path / "here"
    pull(MEMORY, here, print)
    data = (here / "train-00000.bin").read_bytes()
    (here / "train-00000.bin").write_bytes(data[:-1] + b"\xff")
    (here / "val-00001.docs.npy").unlink()
    (here / "train-00001.bin").rename(tmp_path / "outside")
    (here / "train-00001.bin").symlink_to(tmp_path / "outside")  # the right bytes, but not in the folder
    said: list[str] = []
    pull(MEMORY, here, said.append)
    assert sorted(line.split()[0] for line in said[:-1]) == ["train-00000.bin", "train-00001.bin"]
    assert without_card(here) == without_card(tiny_folder)
    assert not (here / "train-00001.bin").is_symlink()


def test_only_the_first_parts_then_the_others(hub: LocalHub, tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    push(tiny_folder, HUB, print)
    here = tmp_path / "here"
    first = pull(HUB, here, print, parts=1)
    assert without_card(here) == without_card(small)
    assert (here / "README.md").read_text() == card(first, f"tiny-{first.fingerprint[:8]}")
    assert verify(here) == []
    before = hub.sent()
    pull(HUB, here, print)
    assert without_card(here) == without_card(tiny_folder)
    assert hub.sent() - before < sum(len(data) for name, data in tree(tiny_folder).items() if "00000" not in name)
    assert pull(HUB, here, print, parts=1) == Manifest.read(tiny_folder)  # never shrinks what is here


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_broken_push_sends_only_the_rest(
    hub: LocalHub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storages, "BATCH_FILES", 4)
    monkeypatch.setattr(retry, "TRIES", 1)
    send = storages.HubStorage._commit
    commits: list[int] = []

    def breaks(storage: storages.HubStorage, additions: list[Any], message: str) -> None:
        commits.append(len(additions))
        if len(commits) == 2:
            hub.faults = [Fault("404", 1, "upload")]
        send(storage, additions, message)

    monkeypatch.setattr(storages.HubStorage, "_commit", breaks)
    with pytest.raises(NetworkError):
        push(tiny_folder, HUB, print)
    assert "manifest.json" not in list(hub.repos["org/tokens"].values())[-1]
    assert hub.received() > 0
    hub.faults = [Fault(fault, 1, "upload")]  # this one passes
    push(tiny_folder, HUB, print)
    puts = [asked for asked in hub.log if asked.method == "PUT"]
    assert len(puts) == len(hub.objects) + 2  # each object once, and the two that met a fault twice
    newest = list(hub.repos["org/tokens"].values())[-1]
    assert {name: newest[name] for name in tree(tiny_folder)} == tree(tiny_folder)


@pytest.mark.parametrize("kind", ["path", "memory", "hub"])
def test_growth_sends_only_the_new_parts(
    hub: LocalHub, tiny_folder: Path, small: Path, tmp_path: Path, kind: str
) -> None:
    url = url_of(kind, tmp_path)
    push(small, url, print)
    said: list[str] = []
    push(tiny_folder, url, said.append)
    new = sorted(without_card(tiny_folder).keys() - tree(small).keys())
    assert sorted(line.split()[0] for line in said[:-1]) == [name for name in new if re.match(r"train-\d+\.bin", name)]
    assert said[-1] == f"{url}: complete, {len(new)} of {len(without_card(tiny_folder)) - 1} files were sent"
    push(small, url, said.append)
    assert said[-1].endswith("this folder 1: nothing to send")
    pull(url, tmp_path / "here", print)
    assert without_card(tmp_path / "here") == without_card(tiny_folder)


def test_a_shard_cut_short_over_there_is_sent_again(tiny_folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    push(tiny_folder, str(there), print)
    (there / "manifest.json").unlink()
    data = (there / "val-00001.bin").read_bytes()
    (there / "val-00001.bin").write_bytes(data[: len(data) // 2])
    said: list[str] = []
    push(tiny_folder, str(there), said.append)
    assert re.search(r": complete, 1 of \d+ files were sent$", said[-1])
    assert without_card(there) == without_card(tiny_folder)


def test_a_readme_that_somebody_wrote_is_kept(tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    push(small, str(there), print)
    pull(str(there), here, print)
    push(tiny_folder, str(there), print)
    manifest = pull(str(there), here, print)
    ours = card(manifest, f"tiny-{manifest.fingerprint[:8]}")
    assert (there / "README.md").read_text() == (here / "README.md").read_text() == ours  # both were ours, and grew
    (there / "README.md").write_text("my own words")
    said: list[str] = []
    push(tiny_folder, str(there), said.append)
    assert said[0] == f"{there}/README.md differs and is kept: change it there"
    assert (there / "README.md").read_text() == "my own words"
    pull(str(there), tmp_path / "other", print)
    assert (tmp_path / "other" / "README.md").read_text() == "my own words"


def test_the_card_has_the_name_that_the_folder_had_at_home(tiny_folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(tiny_folder)
    assert tiny_folder.name == folder_name(manifest.corpus.name, manifest.fingerprint)
    there = Path(shutil.copytree(tiny_folder, tmp_path / "there"))
    (there / "README.md").unlink()
    pull(str(there), tmp_path / "here", print)
    assert tree(tmp_path / "here") == tree(tiny_folder)


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("hf://models/org/name", "ConfigError", "not a dataset of the Hub"),
        ("hf://name", "ConfigError", "not a dataset of the Hub"),
        ("nonsense://x", "ConfigError", "nonsense"),
        ("hf://datasets/org/nothing", "NetworkError", "404"),
        ("memory://nothing", "ConfigError", r"manifest\.json: no such file"),
    ],
)
def test_addresses_that_lead_nowhere(hub: LocalHub, tmp_path: Path, url: str, kind: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        pull(url, tmp_path / "here", print)
    assert type(caught.value).__name__ == kind
    assert not (tmp_path / "here").exists()
