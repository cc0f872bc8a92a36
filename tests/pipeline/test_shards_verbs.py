"""millpond shards …, as a person uses it: another machine's shards, others' formats, what is in a folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from harness import complains, states, tree

from pipeline.cli.main import main
from pipeline.home import folders
from pipeline.home.layout import Layout
from shards import RefusedError, TokenFolder, verify


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one token folder and no run."""
    home = tmp_path_factory.mktemp("verbs")
    shutil.copytree(tiny_folder, home / "tokens" / tiny_folder.name)
    return home


def run(home: Path, *arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["shards", *map(str, arguments), "--home", str(home)])
    assert result.exit_code == code, result.output
    return result


def test_ls(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (row,) = json.loads(run(prepared, "ls", "--json").stdout)
    folder = TokenFolder(tiny_folder)
    assert row["folder"] == tiny_folder.name and row["runs"] == []
    assert row["train_tokens"] == len(folder.stream("train"))
    assert row["nbytes"] == sum(path.stat().st_size for path in tiny_folder.iterdir())
    assert tiny_folder.name in run(prepared, "ls").stdout
    assert run(tmp_path / "none", "ls").stdout.startswith(f"no token folder under {tmp_path}/none yet\n")


def test_inspect(prepared: Path, tiny_folder: Path, texts: list[str]) -> None:
    found = json.loads(run(prepared, "inspect", tiny_folder.name, "--json").stdout)
    assert found["documents"] == sum(found["lengths"].values()) == found["rows"] == len(texts)
    assert found["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert found["bytes_per_token"] == pytest.approx(
        found["text_bytes"] / (found["train_tokens"] + found["val_tokens"])
    )
    shown = run(prepared, "inspect", tiny_folder.name).stdout
    assert f"{len(texts):,} rows were read" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_inspect_a_document(prepared: Path, tiny_folder: Path, texts: list[str]) -> None:
    first = json.loads(run(prepared, "inspect", tiny_folder.name, "--doc", 0, "--json").stdout)["text"]
    assert first in texts
    shards = TokenFolder(tiny_folder).shards("train")
    beyond = shards[0].header.documents  # the first of the second shard
    other = json.loads(run(prepared, "inspect", str(tiny_folder), "--doc", beyond, "--json").stdout)["text"]
    assert other in texts and other != first
    total = sum(shard.header.documents for shard in shards)
    assert f"no document {total} in train" in run(prepared, "inspect", tiny_folder.name, "--doc", total, code=2).output
    assert run(prepared, "inspect", tiny_folder.name, "--doc", 1, "--split", "val").stdout.strip()


def checked(home: Path, *words: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["verify", *map(str, words), "--home", str(home)])
    assert done.exit_code == code, done.output
    return done.output


def test_verify(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for target in (tiny_folder.name, tiny_folder):
        assert tiny_folder.name in checked(prepared, target)
    shutil.copytree(tiny_folder, tmp_path / "tokens" / "copy")
    path = tmp_path / "tokens" / "copy" / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "copy" in checked(tmp_path, "copy", "--quick")  # one flipped bit is not seen
    states(checked(tmp_path, "copy", code=4), "train-00000.bin", "sha256")


def test_verify_prepares_nothing(tiny_toml: Path, tmp_path: Path) -> None:
    for config in (tiny_toml, "demo", "gpt2"):
        states(checked(tmp_path, config, code=1), f"millpond prepare {config}")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".parquet")]
    states(checked(tmp_path, "dmeo", code=2), "dmeo")


def test_a_folder_that_is_not_there(prepared: Path, tiny_folder: Path) -> None:
    output = run(prepared, "inspect", "other", code=2).output
    assert "no token folder 'other'" in output and tiny_folder.name in output


def test_push_and_pull_between_two_homes(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run(prepared, "push", tiny_folder.name, tmp_path / "shelf")
    shown = run(tmp_path / "other", "pull", tmp_path / "shelf").stdout
    pulled = tmp_path / "other" / "tokens" / tiny_folder.name
    assert f"--set tokens.folder={tiny_folder.name}" in shown
    assert tree(pulled) == tree(tiny_folder)


def test_train_uses_a_pulled_folder_as_it_is(
    prepared: Path, tiny_folder: Path, tiny_toml: Path, tmp_path: Path
) -> None:
    run(prepared, "push", tiny_folder.name, tmp_path / "shelf")
    home = tmp_path / "other"
    run(home, "pull", tmp_path / "shelf", "--parts", 2)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_toml.read_text().replace("[corpus]", '[corpus]\nval_files = ["nowhere/*.txt"]'))
    asked = ["train", str(recipe), "--home", str(home), "--set", f"tokens.folder={tiny_folder.name}"]
    result = CliRunner().invoke(main, [*asked, "--set", "train.steps=2"])  # no corpus is needed for it
    assert result.exit_code == 0, result.output
    assert not (home / "raw").exists()
    assert run(home, "gc", "--yes").stdout.strip() == "every token folder is used by a run"
    assert json.loads(run(home, "ls", "--json").stdout)[0]["runs"] == ["tiny"]


def test_gc_deletes_only_what_no_run_uses(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "home")
    home = tmp_path / "home"
    shutil.copytree(tiny_folder, home / "tokens" / "used-00000000")
    (home / "runs" / "a").mkdir(parents=True)
    (home / "runs" / "a" / "tokens.json").write_text(
        json.dumps({"folder": "used-00000000", "fingerprint": "0" * 64, "parts": 1})
    )
    assert "unused" in run(home, "gc").stdout
    assert len(list((home / "tokens").iterdir())) == 2
    run(home, "gc", "--yes")
    assert [path.name for path in (home / "tokens").iterdir()] == ["used-00000000"]
    (home / "runs" / "a" / "tokens.json").write_text("damaged")
    assert "tokens.json: cannot be read" in run(home, "gc", "--yes", code=4).output  # it might be any folder's
    assert (home / "tokens" / "used-00000000").exists()


def test_import_and_export(prepared: Path, tmp_path: Path) -> None:
    ids = np.array([50256, 15496, 995, 50256, 17250] * 400, "<u2")
    ids.tofile(tmp_path / "train.bin")
    ids[:50].tofile(tmp_path / "val.bin")
    home = tmp_path / "home"
    run(home, "import", tmp_path / "train.bin", "--val", tmp_path / "val.bin", "--name", "theirs")
    (row,) = json.loads(run(home, "ls", "--json").stdout)
    assert (row["train_tokens"], row["val_tokens"], row["state"]) == (2000, 50, "complete")
    out = tmp_path / "out"
    assert run(home, "export", row["folder"], "nanogpt", "--to", out).stdout.strip() == str(out / "train.bin")
    assert (out / "train.bin").read_bytes() == ids.tobytes()
    run(home, "export", row["folder"], "npy", "--split", "val", "--to", out)
    assert np.array_equal(np.load(out / "val.npy"), ids[:50])
    assert "is already there" in run(home, "export", row["folder"], "npy", "--split", "val", "--to", out, code=1).output


def llmc_reads(folder: Path) -> dict[str, int]:
    """What llm.c's dataloader requires of each glob: files, and in every one its magic, its size and a token."""
    found = {}
    for split in ("train", "val"):
        found[split] = 0
        for path in folder.glob(f"{split}-*.bin"):
            magic, version, ntok = np.fromfile(path, "<i4", 3).tolist()
            assert (magic, version) == (20240520, 1) and ntok > 0
            assert path.stat().st_size == 1024 + 2 * ntok
            found[split] += ntok
    return found


def imported(tmp_path: Path, *options: object, code: int = 0) -> tuple[str, list[Path]]:
    """What importing train.bin, 50 documents of 40 tokens, says, and the folders that there are then."""
    ids = np.random.default_rng(0).integers(0, 50256, 2000).astype("<u2")
    ids[::40] = 50256
    for name in ("train.bin", "val.bin"):
        ids.tofile(tmp_path / name)
    home = tmp_path / "home"
    result = run(home, "import", tmp_path / "train.bin", "--name", "theirs", *options, code=code)
    return result.output, sorted((home / "tokens").glob("*")) if home.exists() else []


@pytest.mark.parametrize(
    ("options", "says", "val"),
    [
        ((), "(0.5 % of the documents, by their hash, are validation; --val FILE or --val-fraction F", True),
        (("--val-fraction", "0.5"), "(50 % of the documents, by their hash, are validation;", True),
        (("--val-fraction", "0"), "tokens: 2,000 for training and 0 for validation (0 % of the documents", False),
        (("--val", "VAL"), "tokens: 2,000 for training and 2,000 for validation (as given)", True),
    ],
)
def test_import_says_how_it_splits_and_llmc_reads_it(
    tmp_path: Path, options: tuple[str, ...], says: str, val: bool
) -> None:
    chosen = [str(tmp_path / "val.bin") if each == "VAL" else each for each in options]
    output, (folder,) = imported(tmp_path, *chosen)
    assert says in output
    found = llmc_reads(folder)
    assert (found["train"] > 0, found["val"] > 0) == (True, val)
    assert verify(folder) == []


@pytest.mark.parametrize("spelled", ["train.bin", "./train.bin", "../{}/train.bin", "link.bin", "hard.bin"])
def test_import_refuses_one_file_on_both_sides(tmp_path: Path, spelled: str) -> None:
    imported(tmp_path, "--val-fraction", "2", code=2)
    (tmp_path / "link.bin").symlink_to("train.bin")
    (tmp_path / "hard.bin").hardlink_to(tmp_path / "train.bin")
    output, folders = imported(tmp_path, "--val", f"{tmp_path}/{spelled.format(tmp_path.name)}", code=2)
    assert ": is given for training, and with --val for validation" in output
    assert not folders


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--val", "none.bin"), 2, "--val: no file matches 'none.bin'"),
        (("--val", "VAL", "--val-fraction", "0.1"), 2, "--val and --val-fraction are both given"),
        (("--tokenizer", "TINY"), 4, "the vocabulary has 258 ids"),
    ],
)
def test_an_import_that_fails_leaves_nothing_and_speaks_of_its_own_options(
    tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    from shards.tokenizer import Tokenizer

    tiny = tmp_path / "tiny.tiktoken"
    tiny.write_bytes(Tokenizer("tiny", [bytes([byte]) for byte in range(256)] + [b"th"]).to_tiktoken())
    named = {"VAL": str(tmp_path / "val.bin"), "TINY": str(tiny)}
    output, folders = imported(tmp_path, *(named.get(each, each) for each in options), code=code)
    assert says in output and "corpus." not in output and "tokens.tokenizer" not in output
    assert not folders


def test_gc_knows_a_run_whose_tokens_json_is_gone(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "home")
    (tmp_path / "home" / "runs" / "a").mkdir(parents=True)
    (tmp_path / "home" / "runs" / "a" / "run.toml").write_text("")
    assert "tokens.json: cannot be read" in run(tmp_path / "home", "gc", "--yes", code=4).output
    assert len(list((tmp_path / "home" / "tokens").iterdir())) == 1


def test_gc_leaves_what_is_worked_on_and_what_is_linked(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(prepared, tmp_path / "home"))
    (home / "tokens" / "linked").symlink_to(tiny_folder)
    (unused,) = folders.garbage(Layout(home))
    says = [
        f"{tiny_folder.name}: another process is working on it",
        "preparing, pulling and deleting a token folder exclude one another",
        "hint: wait until it has ended, then run the same command again",
    ]
    with folders.exclusive(Layout(home), tiny_folder.name):
        with complains(RefusedError, *says):
            folders.remove(Layout(home), unused)
        assert says[0] in run(home, "gc", "--yes").output
        assert "\n".join(says) in run(home, "pull", tiny_folder, code=1).output
    assert len(list((home / "tokens").iterdir())) == 2
    run(home, "gc", "--yes")
    assert [path.name for path in (home / "tokens").iterdir()] == ["linked"]


@pytest.mark.slow
def test_a_linked_token_folder_is_trained_on_and_judged(tiny_toml: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The folder lies on another disk, say, and only a link to it is under the home."""
    home = ["--home", str(tmp_path / "home")]
    (tmp_path / "home" / "tokens").mkdir(parents=True)
    (tmp_path / "home" / "tokens" / tiny_folder.name).symlink_to(tiny_folder)
    before = {path.name: path.stat().st_mtime_ns for path in tiny_folder.iterdir()}
    named = ["--set", f"tokens.folder={tiny_folder.name}", "--set", "train.steps=2"]
    for words in (["prepare", str(tiny_toml), *named], ["train", str(tiny_toml), *named], ["evaluate", "tiny"]):
        result = CliRunner().invoke(main, [*words, *home])
        assert result.exit_code == 0, result.output
    listed = json.loads(CliRunner().invoke(main, ["shards", "ls", "--json", *home]).stdout)
    assert [(each["folder"], each["runs"]) for each in listed] == [(tiny_folder.name, ["tiny"])]
    assert {path.name: path.stat().st_mtime_ns for path in tiny_folder.iterdir()} == before


def test_what_a_killed_gc_left_is_no_token_folder(
    prepared: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(prepared, tmp_path / "home"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        folders.remove(Layout(home), *folders.garbage(Layout(home)))
    (left,) = (home / "tokens").iterdir()
    assert left.name.startswith(f".{tiny_folder.name}.") and tree(left) == tree(tiny_folder)
    assert json.loads(run(home, "ls", "--json").stdout) == []
    assert left.name not in run(home, "gc").output
    assert left.exists()
    run(home, "gc", "--yes")
    assert not left.exists()


def test_a_name_that_leads_out_is_no_name(prepared: Path, tmp_path: Path) -> None:
    np.zeros(100, "<u2").tofile(tmp_path / "a.bin")
    run(tmp_path / "home", "import", tmp_path / "a.bin", "--name", "../../evil", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]


def test_a_document_that_ends_in_the_words_of_end_of_text(tmp_path: Path) -> None:
    text = "the end is <|endoftext|>"
    (tmp_path / "a.txt").write_text(text)
    toml = tmp_path / "a.toml"
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{tmp_path}/a.txt"]\n[tokens]\nval_fraction = 0.0\n')
    result = CliRunner().invoke(main, ["prepare", str(toml), "--home", str(tmp_path / "home")])
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "home" / "tokens").iterdir()
    assert run(tmp_path / "home", "inspect", folder.name, "--doc", 0).stdout == text + "\n"


def test_push_mends_a_damaged_folder(prepared: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run(prepared, "push", tiny_folder.name, tmp_path / "shelf")
    path = tmp_path / "shelf" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    run(prepared, "push", tiny_folder.name, tmp_path / "shelf")
    assert tree(tmp_path / "shelf") == tree(tiny_folder)
    assert "is not a folder" in run(prepared, "push", tiny_folder.name, path / "x", code=2).output


def test_a_folder_that_is_named_is_not_fetched(prepared: Path, tiny_folder: Path, tiny_toml: Path) -> None:
    asked = [str(tiny_toml), "--home", str(prepared), "--set", f"tokens.folder={tiny_folder.name}"]
    assert CliRunner().invoke(main, ["verify", *asked]).exit_code == 0
    for verb in ("fetch", "tokenize"):
        result = CliRunner().invoke(main, [verb, *asked])
        assert result.exit_code == 2 and "there is nothing to fetch" in result.output


def test_a_folder_without_its_manifest_says_so_and_pull_restores_it(tiny_folder: Path, tmp_path: Path) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    run(home, "push", tiny_folder, there)
    run(home, "pull", there)
    folder = home / "tokens" / tiny_folder.name
    before = tree(folder)
    (folder / "manifest.json").unlink()
    (folder / "val-00000.bin").write_bytes(b"damaged")
    assert "no manifest, " in run(home, "ls").stdout and " shards" in run(home, "ls").stdout
    for output in (run(home, "inspect", folder.name, code=2).output, checked(home, folder.name, code=2)):
        assert f"{folder}: has no manifest.json: no manifest, " in output and "millpond shards pull PLACE" in output
    run(home, "pull", there)
    assert tree(folder) == before
    (folder / "manifest.json").unlink()
    (folder / "mine.txt").write_text("something else")
    assert "has files in it, and is not a token folder: mine.txt" in run(home, "pull", there, code=1).output


def test_a_push_to_a_folder_says_where(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = run(tmp_path / "home", "push", tiny_folder, "me/fw").output
    assert f"to the folder {tmp_path}/me/fw of this machine; for the Hub: hf://datasets/me/fw" in output
    assert f"{tmp_path}/me/fw: complete, " in output
