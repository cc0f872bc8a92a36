"""Whatever the network does: the right bytes, or exit 6 with the reason. Never wrong bytes, never a byte twice."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import complains, files_no_longer_than
from local_hub import Fault, LocalHub

from prepare.corpus import download as downloading
from prepare.corpus import hub as hubs
from prepare.corpus.download import download, matches
from shards import ConfigError, DiskError, NetworkError
from shards.manifest import SourceRecord

Pinned = tuple[str, str, SourceRecord]  # repository, commit, file

NAME = "sample/10BT/000_00000.parquet"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        monkeypatch.setattr(downloading, "timeout_seconds", lambda: 0.3)
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        monkeypatch.setattr(downloading, "SEGMENT", 400_000)
        yield local


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(1_000_000)


@pytest.fixture
def pinned(hub: LocalHub, data: bytes) -> Pinned:
    files = {f"sample/10BT/00{i}_00000.parquet": data if i == 0 else b"x" * i for i in range(5)}
    hub.commit("org/name", {**files, "README.md": b"a card", "other/a.parquet": b"no"})
    repository = hubs.listing("org/name", "main", ["sample/10BT"])
    return "org/name", repository.commit, repository.files["sample/10BT/000_00000.parquet"]


KINDS = ["429", "500", "503", "cut", "stall", "html", "flip", "length", "ignore-range", "404", "redirect-loop"]
REASONS = {
    "429": "status 429 Too Many Requests (5 times in a row)",
    "500": "status 500 Internal Server Error (5 times in a row)",
    "503": "status 503 Service Unavailable (5 times in a row)",
    "stall": "no byte came before the time-out",
    "html": "a web page came instead of the file: a login page or a proxy answers in the Hub's place",
    "flip": "3 times the wrong bytes: got sha256:",
    "length": "1000004 bytes are offered, the listing says 1000000",
    "404": "status 404 Not Found",
    "redirect-loop": "redirected in a circle",
}


@pytest.mark.parametrize("times", [1, 2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault(hub: LocalHub, pinned: Pinned, data: bytes, tmp_path: Path, kind: str, times: int) -> None:
    path = tmp_path / "a.parquet"
    hub.faults = [Fault(kind, times, "resolve" if kind == "redirect-loop" else "cdn")]
    if kind == "404" or (times == -1 and kind not in ("cut", "ignore-range")):
        with pytest.raises(NetworkError) as caught:
            download(hubs.remote(*pinned), path, threading.Event())
        assert REASONS[kind].split("(")[0] in str(caught.value)
        assert caught.value.exit_code == 6
        assert not path.exists()
        hub.faults = []  # the network is well again: the same call goes on
    download(hubs.remote(*pinned), path, threading.Event())
    assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


def test_nothing_is_fetched_twice_after_a_cut(hub: LocalHub, pinned: Pinned, data: bytes, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", 3)]
    download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    assert hub.sent() == len(data)


def test_after_sigkill_only_the_rest_is_fetched(hub: LocalHub, pinned: Pinned, data: bytes, tmp_path: Path) -> None:
    hub.slow = 0.02
    code = (
        "import sys, threading; from pathlib import Path; from prepare.corpus import download, hub;"
        "download.SEGMENT = 400_000;"
        "r = hub.listing('org/name', 'main', ['sample/10BT']);"
        "file = r.files['sample/10BT/000_00000.parquet'];"
        "download.download(hub.remote('org/name', r.commit, file), Path(sys.argv[1]), threading.Event())"
    )
    for _ in range(2):
        before = hub.sent()
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.parquet")])
        while hub.sent() < before + 200_000:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    hub.slow = 0.0
    download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    assert (tmp_path / "a.parquet").read_bytes() == data
    assert hub.sent() <= len(data) + 2 * 2 * downloading.CHUNK  # two kills, two connections, at most a chunk each
    assert hub.sent() < 2 * len(data)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


def test_a_moved_main_changes_nothing_that_was_pinned(
    hub: LocalHub, pinned: Pinned, data: bytes, tmp_path: Path
) -> None:
    hub.commit("org/name", {NAME: b"something else entirely"})
    download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    assert (tmp_path / "a.parquet").read_bytes() == data


def test_the_token_is_not_sent_to_another_host(
    hub: LocalHub, pinned: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    assert not any(asked.authorization for asked in hub.log)
    monkeypatch.setenv("MILLPOND_TRUST_ENDPOINT", "1")
    hubs.listing("org/name", "main", ["sample/10BT"])
    download(hubs.remote(*pinned), tmp_path / "b.parquet", threading.Event())
    assert {asked.authorization for asked in hub.log if asked.where == "hub" and "resolve" in asked.path} == {
        "",
        "Bearer hf_canary",
    }
    assert not any(asked.authorization for asked in hub.log if asked.where == "cdn")  # it stays with the hub


def test_the_listing(hub: LocalHub, pinned: Pinned, data: bytes) -> None:
    repository = hubs.listing("org/name", "main", ["sample/10BT"])
    assert list(repository.files) == [f"sample/10BT/00{i}_00000.parquet" for i in range(5)]
    assert repository.commit == next(iter(hub.repos["org/name"]))
    card = hubs.listing("org/name", repository.commit, [""]).files["README.md"]
    assert card.digest.startswith("git:")


def test_a_small_file_is_checked_against_git(hub: LocalHub, pinned: Pinned, tmp_path: Path) -> None:
    repository = hubs.listing("org/name", "main", [""])
    file = repository.files["README.md"]
    download(hubs.remote("org/name", repository.commit, file), tmp_path / "card", threading.Event())
    assert matches(tmp_path / "card", file.nbytes, file.digest)
    (tmp_path / "card").write_bytes(b"A card")
    assert not matches(tmp_path / "card", file.nbytes, file.digest)


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_listing_is_asked_for_again(hub: LocalHub, pinned: Pinned, status: str) -> None:
    hub.faults = [Fault(status, 2, "api")]
    assert hubs.listing("org/name", "main", ["sample/10BT"]).commit == pinned[1]


def test_a_hub_that_never_answers(hub: LocalHub) -> None:
    hub.faults = [Fault("503", -1, "api")]
    with complains(NetworkError, "org/name", "503"):
        hubs.listing("org/name", "main", [""])


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with complains(NetworkError, "http://127.0.0.1:9", "org/name"):
        hubs.listing("org/name", "main", [""])


def test_what_is_not_there_is_said(hub: LocalHub, pinned: Pinned) -> None:
    with complains(ConfigError, "org/none", "answers 404"):
        hubs.listing("org/none", "main", [""])
    with complains(ConfigError, "org/name", "'dev'"):
        hubs.listing("org/name", "dev", [""])
        assert hubs.listing("org/name", "main", ["nowhere"]).files == {}  # the pattern that named it is blamed


@pytest.mark.parametrize(
    ("status", "secret", "facts"),
    [
        ("401", "", ("401: injected", "no token", "set HF_TOKEN")),
        ("401", "hf_old", ("401: injected", "expired", "set HF_TOKEN")),
        ("403", "hf_old", ("403: injected", "accept the terms", "set HF_TOKEN")),
    ],
)
def test_a_refusal_is_in_the_words_of_the_hub(
    hub: LocalHub, pinned: Pinned, monkeypatch: pytest.MonkeyPatch, status: str, secret: str, facts: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MILLPOND_TRUST_ENDPOINT", "1")
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.faults = [Fault(status, -1, "api")]
    with complains(NetworkError, "org/name", *facts):
        hubs.listing("org/name", "main", ["sample/10BT"])


def test_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with complains(
        NetworkError,
        "org/name: HF_HUB_OFFLINE is set, and nothing of it was pinned here before",
        "the files to read are not known without asking the Hub once",
        "hint: unset HF_HUB_OFFLINE for the first run",
    ):
        hubs.listing("org/name", "main", [""])


def test_a_full_disk(hub: LocalHub, pinned: Pinned, data: bytes, tmp_path: Path) -> None:
    with files_no_longer_than(100_000), pytest.raises(DiskError, match="File too large"):
        download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    download(hubs.remote(*pinned), tmp_path / "a.parquet", threading.Event())
    assert (tmp_path / "a.parquet").read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]
