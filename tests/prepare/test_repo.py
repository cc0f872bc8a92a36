"""corpus.repo as people write it."""

from pathlib import Path

import pytest
from harness import complains

from prepare.config import CorpusConfig
from prepare.corpus import hub, pin
from prepare.corpus.repo import parse_repo
from shards import ConfigError, CorruptError
from shards.manifest import SourceRecord

HUB = "https://huggingface.co/datasets"


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("me/set", ("me/set", "", "")),
        ("gsm8k", ("gsm8k", "", "")),
        (" me/set/ ", ("me/set", "", "")),
        ("datasets/me/set", ("me/set", "", "")),
        (f"{HUB}/me/set", ("me/set", "", "")),
        (f"{HUB}/me/set/", ("me/set", "", "")),
        ("http://www.huggingface.co/datasets/me/set?row=1#top", ("me/set", "", "")),
        ("https://hf.co/datasets/me/set", ("me/set", "", "")),
        (f"{HUB}/gsm8k", ("gsm8k", "", "")),
        (f"{HUB}/gsm8k/viewer", ("gsm8k", "", "")),
        (f"{HUB}/me/set/viewer/default/train", ("me/set", "", "")),
        (f"{HUB}/me/set/tree/main", ("me/set", "main", "")),
        (f"{HUB}/me/set/tree/v1.0/sample/10BT", ("me/set", "v1.0", "sample/10BT")),
        (f"{HUB}/me/set/tree/refs%2Fconvert%2Fparquet/en", ("me/set", "refs/convert/parquet", "en")),
        (f"{HUB}/me/set/blob/main/data/a%20b.parquet", ("me/set", "main", "data/a b.parquet")),
        (f"{HUB}/me/set/resolve/main/a.parquet?download=true", ("me/set", "main", "a.parquet")),
        ("hf://datasets/me/set", ("me/set", "", "")),
        ("hf://datasets/me/set@v2/data", ("me/set", "v2", "data")),
        ("hf://datasets/me/set@refs/convert/parquet/en", ("me/set", "refs/convert/parquet", "en")),
        ("hf://datasets/me/set@refs/pr/7", ("me/set", "refs/pr/7", "")),
        ("huggingface.co/datasets/me/set", ("me/set", "", "")),
        ("hf.co/datasets/me/set/tree/v2/a", ("me/set", "v2", "a")),
        ("git@hf.co:datasets/me/set.git", ("me/set", "", "")),
        (f"{HUB}/me/set.git", ("me/set", "", "")),
        ("me/set/sub/folder", ("me/set", "", "sub/folder")),
        ("me/set/data/a.jsonl", ("me/set", "", "data/a.jsonl")),
    ],
)
def test_understood(given: str, place: tuple[str, str, str]) -> None:
    assert parse_repo(given)[:3] == place


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("foo bar", "is not the name of a dataset"),
        ("me/my set", "is not the name of a dataset"),
        ("/", "is not the name of a dataset"),
        ("me/a..b", "is not the name of a dataset"),
        ("https://huggingface.co/gpt2", "is the page of a model or a Space"),
        ("https://huggingface.co/spaces/me/app", "is the page of a model or a Space"),
        ("hf://models/me/set", "names a model or a Space"),
        ("spaces/me/app", "names something else than a dataset: spaces"),
        ("https://github.com/me/set", "is not on the Hub"),
        ("s3://bucket/set", "begins with s3://"),
    ],
)
def test_refused_by_name(given: str, reason: str) -> None:
    with complains(ConfigError, reason, "corpus.repo", "OWNER/NAME"):
        parse_repo(given)


def test_a_mirror_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.example")
    assert parse_repo("https://hf-mirror.example/datasets/me/set").repo == "me/set"


def test_what_is_named_as_well_has_its_own_field() -> None:
    def resolved(repo: str, **fields: object) -> CorpusConfig:
        return pin.resolve(CorpusConfig(kind="hub", repo=repo, **fields))  # type: ignore[arg-type]

    plain = resolved("me/set", files=("data/*.parquet",), revision="v1")
    assert resolved(f"{HUB}/me/set/tree/v1/data", files=("*.parquet",)) == plain
    assert resolved("hf://datasets/me/set@v1", files=("data/*.parquet",)) == plain
    assert resolved("datasets/me/set/data", files=("data/*.parquet",), revision="v1") == plain
    assert resolved(f"{HUB}/me/set/tree/v1/data").files == ("data/**/*.parquet",)
    assert resolved(f"{HUB}/me/set/blob/main/a.csv").files == ("a.csv",)
    with complains(ConfigError, "corpus.repo", "'v1'", "corpus.revision", "'v2'"):
        resolved(f"{HUB}/me/set/tree/v1", files=("*.parquet",), revision="v2")
    with complains(ConfigError, "'a.csv'", "corpus.files"):
        resolved("me/set/a.csv", files=("b.csv",))
    with complains(ConfigError, "corpus.repo", "corpus.files"):
        resolved("me/set")


def test_a_dataset_without_an_owner_is_pinned_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    file = SourceRecord(name="data/a.jsonl", nbytes=20, digest="git:" + "1" * 40)
    listing = hub.Repository(commit, "", {file.name: file})
    monkeypatch.setattr(hub, "listing", lambda *_: listing)
    config = CorpusConfig(kind="hub", repo=f"{HUB}/gsm8k", files=("data/*.jsonl",))
    for force in (False, False, True):
        corpus = pin.pin(config, tmp_path / "raw", force=force)
        assert corpus.record.details == {"repo": "gsm8k", "commit": commit} and corpus.sources == [file]
        corpus.close()


def test_a_lock_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SourceRecord(name="a.jsonl", nbytes=20, digest="git:" + "1" * 40)
    monkeypatch.setattr(hub, "listing", lambda *_: hub.Repository("no commit", "", {file.name: file}))
    config = CorpusConfig(kind="hub", repo="me/set", files=("*.jsonl",))
    with complains(CorruptError, "lock.json"):
        pin.pin(config, tmp_path / "raw")
    assert not (tmp_path / "raw" / "lock.json").exists()
