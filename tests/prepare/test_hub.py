"""What is said when the Hub's listing, or what asks for it, is not what it must be; and names that cannot be kept."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import complains
from local_hub import LocalHub, _Handler

from prepare.config import CorpusConfig
from prepare.corpus import pin
from shards import ConfigError, MillpondError, NetworkError, RefusedError
from shards.sharing.hub_access import endpoint


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        yield local


def pinned(folder: Path, files: str = "data/*.jsonl", val_files: tuple[str, ...] = ()) -> list[str]:
    config = CorpusConfig(kind="hub", repo="me/set", files=(files,), val_files=val_files)
    corpus = pin.pin(config, folder / "raw")
    corpus.close()
    return [source.name for source in corpus.sources]


@pytest.mark.parametrize(
    "answer",
    [
        (b"<html>please log in</html>", {"Content-Type": "text/html"}),
        (["a list"], {}),
        ({"siblings": 7}, {}),
        (b"", {}),
    ],
    ids=["a login page", "a list", "no dataset", "nothing"],
)
def test_an_answer_that_is_not_the_hubs(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[Any, dict[str, str]]
) -> None:
    monkeypatch.setattr(_Handler, "serve_api", lambda self, *_: self.reply(200, *answer))
    with complains(NetworkError, "me/set"):
        pinned(tmp_path)


@pytest.mark.parametrize("secret", ["\u201chf_abc\u201d", "hf_\u00e9", "hf_\u200babc"])
def test_a_token_that_cannot_be_sent(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("MILLPOND_TRUST_ENDPOINT", "1")
    with complains(ConfigError, "HF_TOKEN"):
        pinned(tmp_path)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_kept_back(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    headers = {"X-Error-Message": "Please log in"}
    monkeypatch.setattr(_Handler, "serve_api", lambda self, *_: self.reply(status, {}, headers))
    with complains(NetworkError, "MILLPOND_TRUST_ENDPOINT=1"):
        pinned(tmp_path)


@pytest.mark.parametrize("pattern", ["missing/*.jsonl", "data/missing/a.jsonl", "data/x*.jsonl"])
def test_the_field_that_is_meant_is_blamed(hub: LocalHub, tmp_path: Path, pattern: str) -> None:
    hub.commit("me/set", {"data/a.jsonl": b"{}"})
    with complains(ConfigError, "corpus.val_files"):
        pinned(tmp_path, val_files=(pattern,))


@pytest.mark.parametrize("length", [1001, 1100, 2000])
def test_a_name_that_the_lock_cannot_hold_is_not_pinned(hub: LocalHub, tmp_path: Path, length: int) -> None:
    hub.commit("me/set", {"data/" + "n" * (length - 11) + ".jsonl": b"{}", "data/a.jsonl": b"{}"})
    with complains(ConfigError, f"{length:,}"):
        pinned(tmp_path)
    assert not (tmp_path / "raw/lock.json").exists()
    assert pinned(tmp_path, "data/a.jsonl") == ["data/a.jsonl"]


def local(*patterns: str) -> MillpondError:
    with pytest.raises(ConfigError) as caught:
        pin.pin(CorpusConfig(kind="files", files=patterns), Path("raw"))
    return caught.value


def test_a_local_name_that_the_manifest_cannot_hold(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 5)
    deep.mkdir(parents=True)
    for path in (tmp_path / "a.txt", deep / "b.txt"):
        path.write_text("text")
    assert "a name of 1,010 characters" in local(f"{tmp_path}/**/*.txt").what


@pytest.mark.parametrize("pattern", ["", " ", "a\0b.txt", "\x1b*.txt"])
def test_what_names_no_file(pattern: str) -> None:
    assert local(pattern).what == f"corpus.files: {pattern!r} names no file"


def test_the_home_of_a_user_that_is_not_there() -> None:
    assert local("~no-such-user/a.txt").what == "corpus.files: ~no-such-user/a.txt: there is no such user here"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert local(f"{tmp_path}/pipe.txt").what == f"corpus.files: {tmp_path}/pipe.txt is not a regular file"


def test_terms_that_are_not_accepted(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("MILLPOND_TRUST_ENDPOINT", "1")
    monkeypatch.setattr(_Handler, "serve_api", lambda self, *_: self.reply(403, {}, {"X-Error-Message": "It is gated"}))
    with complains(NetworkError, f"{hub.url}/datasets/me/set"):
        pinned(tmp_path)


def test_patterns_with_spaces_are_told_apart(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("me/set", {f"{name}.txt": b"a text\n" * 9 for name in ("a", "b", "a b")})
    lock = tmp_path / "raw" / "lock.json"
    assert pinned(tmp_path, "a b.txt") == ["a b.txt"]
    both = CorpusConfig(kind="hub", repo="me/set", files=("a", "b.txt"))
    with pytest.raises(RefusedError, match="pinned with another files"):
        pin.pin(both, tmp_path / "raw")
    text = lock.read_text()
    lock.write_text(text.replace(r'"[\"a b.txt\"]"', '"a b.txt"'))  # as earlier versions spelled it
    assert lock.read_text() != text
    assert pinned(tmp_path, "a b.txt") == ["a b.txt"]


def test_a_hub_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with complains(NetworkError, "me/set"):
            pinned(tmp_path)


@pytest.mark.parametrize("given", ["hf-mirror.com", "localhost:8080", "http://", "//hf-mirror.com/", "file:///tmp"])
def test_an_endpoint_that_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", given)
    with complains(ConfigError, "HF_ENDPOINT", f"'{given}'"):
        pinned(tmp_path)


def test_an_empty_endpoint_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", " ")
    assert endpoint() == "https://huggingface.co"
