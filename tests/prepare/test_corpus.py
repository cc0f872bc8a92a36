"""A corpus on the Hub, end to end: pinned once, only what is needed fetched, read where it lies."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import command, parquet, prepared, tree
from local_hub import Fault, LocalHub

from pipeline.config import load
from shards import Manifest, MillpondError, NetworkError, TokenFolder

TOML = """
[corpus]
kind = "hub"
name = "web"
repo = "org/web"
files = ["sample/*.parquet"]
[tokens]
part_tokens = 20_000
workers = 1
"""


@pytest.fixture
def hub(texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as local:
        monkeypatch.setenv("HF_ENDPOINT", local.url)
        third = len(texts) // 3
        local.commit("org/web", {f"sample/{i}.parquet": parquet(texts[i * third : (i + 1) * third]) for i in range(3)})
        yield local


def prepare(tmp_path: Path, *settings: str, home: str = "home") -> Path:
    toml = tmp_path / "web.toml"
    toml.write_text(TOML)
    return prepared(load(str(toml), settings)[1], tmp_path / home)


def test_what_is_prepared_is_pinned(hub: LocalHub, tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    manifest = Manifest.read(folder)
    assert manifest.complete
    assert manifest.corpus.details == {"repo": "org/web", "commit": next(iter(hub.repos["org/web"]))}
    assert [source.name for source in manifest.sources] == ["sample/0.parquet", "sample/1.parquet", "sample/2.parquet"]
    hub.commit("org/web", {"sample/9.parquet": parquet(["main has moved"] * 9)})
    asked = len(hub.log)
    assert prepare(tmp_path) == folder
    assert len(hub.log) == asked  # the second time nothing is asked of the Hub at all


def test_only_the_files_that_are_needed_are_fetched(hub: LocalHub, tmp_path: Path) -> None:
    prepare(tmp_path, "tokens.max_tokens=30000")
    raw = tmp_path / "home" / "raw" / "web" / "sample"
    assert [path.name for path in raw.iterdir()] == ["0.parquet"]
    grown = prepare(tmp_path, "tokens.max_tokens=90000")
    assert len(list(raw.iterdir())) == 2
    at_once = prepare(tmp_path, "tokens.max_tokens=90000", "tokens.workers=2", home="once")
    assert tree(grown) == tree(at_once)


def test_a_broken_download_goes_on(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults = [Fault("503", -1)]
    with pytest.raises(NetworkError):
        prepare(tmp_path)
    hub.faults = [Fault("cut", 2), Fault("flip", 1)]
    folder = prepare(tmp_path)
    hub.faults = []
    assert tree(folder) == tree(prepare(tmp_path, home="calm"))
    assert not list((tmp_path / "home" / "raw" / "web").rglob(".*"))


@pytest.mark.slow
def test_a_file_in_the_users_cache_is_read_where_it_lies(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_hub_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hf_hub_download("org/web", "sample/0.parquet", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path / "cache")
    prepare(tmp_path, "tokens.max_tokens=30000")
    assert not (tmp_path / "home" / "raw" / "web" / "sample").exists()
    (cached,) = (tmp_path / "cache").rglob("0.parquet")
    cached.resolve().write_bytes(b"rotten")
    prepare(tmp_path, "tokens.max_tokens=30000", home="other")  # a rotten copy is not believed
    assert (tmp_path / "other" / "raw" / "web" / "sample" / "0.parquet").exists()


def test_offline_works_from_what_is_here(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, "tokens.max_tokens=30000")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare(tmp_path, "tokens.max_tokens=30000") == first
    with pytest.raises(MillpondError, match=r"sample/1\.parquet of org/web is not here, and HF_HUB_OFFLINE is set"):
        prepare(tmp_path, "tokens.max_tokens=90000")


def test_the_lock_says_what_was_asked(hub: LocalHub, tmp_path: Path) -> None:
    prepare(tmp_path, "tokens.max_tokens=1")
    lock = json.loads((tmp_path / "home" / "raw" / "web" / "lock.json").read_text())
    asked = {"kind": "hub", "repo": "org/web", "revision": "main", "files": "sample/*.parquet", "val_files": ""}
    assert lock["asked"] == asked
    assert [source["nbytes"] for source in lock["sources"]] == [
        len(data) for data in hub.repos["org/web"][lock["record"]["details"]["commit"]].values()
    ]


def test_the_next_file_comes_while_this_one_is_read(hub: LocalHub, tmp_path: Path) -> None:
    """The second is asked for although only the first was wanted; what is under way ends when the corpus is closed."""
    from prepare.config import CorpusConfig
    from prepare.corpus import pin

    config = CorpusConfig(kind="hub", repo="org/web", files=("sample/*.parquet",))
    put_off = threading.Event()

    def note(text: str) -> None:
        if "1.parquet: status 503" in text:
            put_off.set()

    hub.faults = [Fault("503", -1, retry_after="60", path="1.parquet")]
    corpus = pin.pin(config, tmp_path / "all", note=note)
    assert corpus.path(0).name == "0.parquet"
    assert put_off.wait(60)
    corpus.close()
    asked = [asked.path[-9:] for asked in hub.log if asked.where == "cdn"]
    assert asked.count("1.parquet") == 1  # had the minute been waited for, there would be another
    assert not list((tmp_path / "all").rglob("1.parquet"))


def test_what_is_enough_is_not_fetched_ahead(hub: LocalHub, tmp_path: Path) -> None:
    from prepare.config import CorpusConfig
    from prepare.corpus import pin

    config = CorpusConfig(kind="hub", repo="org/web", files=("sample/*.parquet",))
    corpus = pin.pin(config, tmp_path / "some", max_tokens=1000)
    assert corpus.needed == 1
    corpus.path(0)
    corpus.close()  # every request that was made is in the log by now
    assert {asked.path[-9:] for asked in hub.log if "resolve" in asked.path} == {"0.parquet"}


@pytest.mark.slow
def test_two_recipes_fetch_the_same_files_at_once(hub: LocalHub, tmp_path: Path) -> None:
    """Each file once, and both folders right."""
    hub.slow = 0.01
    toml = tmp_path / "web.toml"
    toml.write_text(TOML)
    home = tmp_path / "home"
    both = [
        subprocess.Popen(command("prepare", toml, "--home", home, "--set", f"tokens.part_tokens={size}"))
        for size in (20_000, 30_000)
    ]
    assert [process.wait() for process in both] == [0, 0]
    whole = [asked.path for asked in hub.log if asked.where == "cdn" and asked.range.startswith("bytes=0-")]
    assert len(whole) == len(set(whole)) == 3  # all else are footers
    assert len(list((home / "tokens").iterdir())) == 2


def test_the_column_may_be_named_after_the_files_were_pinned(hub: LocalHub, tmp_path: Path) -> None:
    """What the error about a missing column advises must work."""
    with pytest.raises(MillpondError, match="no column 'body', it has text, url"):
        prepare(tmp_path, "corpus.text_column=body")
    folder = prepare(tmp_path, "corpus.text_column=text")
    assert Manifest.read(folder).corpus.text_column == "text"


def test_a_listing_that_leads_out_of_its_folder(hub: LocalHub, tmp_path: Path) -> None:
    hub.commit("org/web", {"sample/../../../up.parquet": parquet(["x"])})
    with pytest.raises(MillpondError, match="is outside of its folder"):
        prepare(tmp_path)
    assert not list(tmp_path.rglob("up.parquet"))


@pytest.mark.parametrize("missing", ['corpus.repo=""', "corpus.files=[]"])
def test_a_hub_corpus_without_a_name(tmp_path: Path, missing: str) -> None:
    with pytest.raises(MillpondError, match=r"corpus\.repo or corpus\.files is not set"):
        prepare(tmp_path, missing)


def test_source_files_go_when_their_parts_are_sealed(hub: LocalHub, tmp_path: Path) -> None:
    kept = prepare(tmp_path, home="kept")
    gone = prepare(tmp_path, "corpus.keep_raw=false")
    assert tree(gone) == tree(kept)
    raw = tmp_path / "home" / "raw" / "web"
    assert not list(raw.rglob("*.parquet"))
    sent = hub.sent()
    (tmp_path / "home" / "receipts" / f"tokenize-{gone.name}.json").unlink()
    assert prepare(tmp_path, "corpus.keep_raw=false") == gone
    assert hub.sent() == sent  # what is sealed is not asked for again


@pytest.mark.slow
def test_growth_without_the_files_before(hub: LocalHub, tmp_path: Path) -> None:
    small = prepare(tmp_path, "corpus.keep_raw=false", "tokens.max_tokens=70000")
    fetched = {asked.path.rpartition("/")[2] for asked in hub.log if asked.where == "cdn"}
    hub.log.clear()
    grown = prepare(tmp_path, "corpus.keep_raw=false")
    again = {asked.path.rpartition("/")[2] for asked in hub.log if asked.where == "cdn"}
    assert grown == small and "0.parquet" in fetched and "0.parquet" not in again
    assert tree(grown) == tree(prepare(tmp_path, home="once"))


@pytest.mark.slow
def test_a_killed_prepare_asks_only_for_files_that_are_not_sealed(hub: LocalHub, tmp_path: Path) -> None:
    toml = tmp_path / "web.toml"
    toml.write_text(TOML)
    home = tmp_path / "killed"
    arguments = command("prepare", toml, "--home", home, "--set", "corpus.keep_raw=false", "--set", "tokens.workers=1")
    hub.slow = 0.02
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(home.glob("tokens/*/.parts/*.json"))) < 4:
        time.sleep(0.002)
    process.kill()
    process.wait()
    hub.slow = 0.0
    sealed = len(list(home.glob("tokens/*/.parts/*.json")))
    assert sealed >= 4
    hub.log.clear()
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
    assert not any("0.parquet" in asked.path for asked in hub.log)
    (folder,) = (home / "tokens").iterdir()
    assert tree(folder) == tree(prepare(tmp_path, home="calm"))
    assert not list(home.rglob("*.part"))


def test_files_that_another_recipe_reads_are_left(hub: LocalHub, tmp_path: Path) -> None:
    from prepare.config import CorpusConfig
    from prepare.corpus import pin

    config = CorpusConfig(kind="hub", repo="org/web", files=("sample/*.parquet",), keep_raw=False)
    one, other = (pin.pin(config, tmp_path / "raw" / "web") for _ in range(2))
    path = one.path(0)
    assert other.path(0) == path
    one.release(0)
    assert path.exists()
    other.close()
    one.release(0)
    assert not path.exists()
    one.close()


def test_csv_from_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    rows = "text,score\r\n" + "".join(f'"row {i}, with ""quotes""\nand a line",{i}\r\n' for i in range(50))
    hub.commit("org/web", {"sample/a.csv": rows.encode()})
    folder = TokenFolder(prepare(tmp_path, 'corpus.files="sample/*.csv"', 'corpus.filters=["score >= 10"]'))
    assert folder.manifest.counts.dropped == {"not score >= 10": 10}
    text = folder.tokenizer.decode(folder.shards("train")[0].document(0)[1:])
    assert text.startswith("row 1") and text.endswith('with "quotes"\nand a line')


def test_a_repository_on_xet_is_read_over_plain_http(hub: LocalHub, tmp_path: Path) -> None:
    hub.xet = True
    folder = prepare(tmp_path)
    assert Manifest.read(folder).complete
    assert {asked.where for asked in hub.log} == {"hub", "cdn"}


@pytest.mark.slow
def test_a_file_replaced_under_a_reader(
    hub: LocalHub, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process that pinned a newer commit: what was read of both is not published."""
    from prepare.part_builder import Builder

    build, replaced = Builder.build, []

    def and_replace(builder: Builder, part: object) -> object:
        record = build(builder, part)  # type: ignore[arg-type]
        if not replaced:
            path = tmp_path / "home" / "raw" / "web" / "sample" / "0.parquet"
            replaced.append(path.read_bytes())
            path.unlink()
            path.write_bytes(parquet(["another text"] * (len(texts) // 3)))
        return record

    with monkeypatch.context() as patch, pytest.raises(MillpondError, match=r"0\.parquet: changed while it was read"):
        patch.setattr(Builder, "build", and_replace)
        prepare(tmp_path, "corpus.keep_raw=false")
    assert not list((tmp_path / "home" / "tokens").rglob("manifest.json"))
    assert tree(prepare(tmp_path)) == tree(prepare(tmp_path, home="calm"))


def test_another_corpus_of_the_same_name(hub: LocalHub, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(MillpondError, match=r"lock\.json: corpus web is pinned with another files"):
        prepare(tmp_path, 'corpus.files="sample/0.parquet"')


def test_every_pattern_must_match(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(MillpondError, match=r"no file matches sample/validation\*"):
        prepare(tmp_path, 'corpus.val_files="sample/validation*"')


def test_max_tokens_does_not_count_files_of_validation(hub: LocalHub, tmp_path: Path) -> None:
    folder = prepare(tmp_path, 'corpus.val_files="sample/0.parquet"', "tokens.max_tokens=30000")
    manifest = Manifest.read(folder)
    assert manifest.tokens("val") > 30_000
    assert manifest.tokens("train") >= 30_000
    assert not manifest.complete


def test_megatrons_index_comes_with_its_tokens(hub: LocalHub, tmp_path: Path) -> None:
    import numpy as np
    from foreign import megatron

    ids = np.arange(6000, dtype="<u2") % 50000
    path = megatron(tmp_path / "web.bin", ids, 8, [10] * 600, [*range(601)])
    files = {f"sample/web{suffix}": path.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    hub.commit("org/web", {**files, "sample/zzz.bin": np.arange(100, dtype="<u2").tobytes()})
    for files_asked in ('corpus.files="sample/*.bin"', 'corpus.files="sample/web.*"'):
        home = files_asked[-6:-1].strip("*.")
        folder = prepare(tmp_path, files_asked, "corpus.keep_raw=false", "tokens.max_tokens=10", home=home)
        documents = [len(shard.documents) for split in ("train", "val") for shard in TokenFolder(folder).shards(split)]
        assert sum(documents) == 600
        assert not list((tmp_path / home / "raw").rglob("web.*"))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_halves_that_a_kill_left_beside_the_whole_file_are_removed(hub: LocalHub, tmp_path: Path, keep: bool) -> None:
    """It comes between the publishing of the file and the removal of what it was joined from."""
    toml = tmp_path / "web.toml"
    toml.write_text(TOML)
    code = (
        "import os, signal, sys; from pathlib import Path; real = Path.unlink\n"
        "def unlink(self, *a, **k):\n"
        "    if self.suffix == '.part': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *a, **k)\n"
        "Path.unlink = unlink\n"
        "from pipeline.cli.main import main; main(sys.argv[1:])"
    )
    arguments = [str(each) for each in ("prepare", toml, "--home", tmp_path / "home")]
    killed = subprocess.run([command()[0], "-c", code, *arguments], capture_output=True, check=False)
    assert killed.returncode == -9
    raw = tmp_path / "home" / "raw" / "web"
    assert list(raw.rglob("*.part"))
    folder = prepare(tmp_path, f"corpus.keep_raw={json.dumps(keep)}")
    assert not [path for path in raw.rglob("*") if path.suffix in (".part", ".wrong")]
    assert bool(list(raw.rglob("*.parquet"))) == keep
    assert tree(folder) == tree(prepare(tmp_path, home="calm"))


def test_a_download_says_how_far_it_is(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prepare.config import CorpusConfig
    from prepare.corpus import pin
    from shards.numbers import size
    from shards.sharing import progress

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    config = CorpusConfig(kind="hub", repo="org/web", files=("sample/*.parquet",))
    for home, said in (("all", list[str]()), ("all", list[str]())):
        corpus = pin.pin(config, tmp_path / home, note=said.append)
        for i in range(3):
            corpus.path(i)
        corpus.close()
        lines = [line for line in said if " left" in line]
        if lines:
            whole = sum(source.nbytes for source in corpus.sources)
            pattern = rf"sample/\d\.parquet: \S+ .B of \S+ .B, \S+ .B/s, 0:\d\d left; in all \S+ .B of {size(whole)}, "
            assert all(re.match(pattern, line) for line in lines)
            assert f"in all {size(whole)} of {size(whole)}, 0:00 left" in lines[-1]
            first = lines
    assert first and not lines  # the second time all is here


def test_what_an_earlier_process_left_counts(hub: LocalHub, tmp_path: Path) -> None:
    from prepare.corpus import hub as hubs
    from prepare.corpus.download import download

    found = hubs.listing("org/web", "main", ["sample"])
    file = found.files["sample/0.parquet"]
    hub.faults = [Fault("cut", 1), Fault("404", 1)]
    told: list[tuple[int, bool]] = []
    remote = hubs.remote("org/web", found.commit, file)
    with pytest.raises(NetworkError):
        download(remote, tmp_path / "a", threading.Event(), came=lambda *each: told.append(each))
    before = sum(nbytes for nbytes, _ in told)
    assert 0 < before < file.nbytes and all(now for _, now in told)
    told.clear()
    download(remote, tmp_path / "a", threading.Event(), came=lambda *each: told.append(each))
    assert told[0] == (before, False)
    assert sum(nbytes for nbytes, _ in told) == file.nbytes
