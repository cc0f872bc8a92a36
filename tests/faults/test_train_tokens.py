"""Tokens that a run must not learn from: ids beyond the vocabulary, another tokenizer's, another folder's."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from harness import TINY, millpond

from shards import CorruptError, Manifest, Shard, TokenFolder
from shards.atomic import sha256_of
from shards.header import HEADER_BYTES
from shards.manifest import encode

STEPS = ("--set", "train.steps=3")


def forge(folder: Path, file: str, at: int, token: int) -> int:
    """Another id at one place, every hash made to agree; returns its offset in the file."""
    path = folder / file
    header = Shard(path).header
    tokens = np.frombuffer(path.read_bytes(), header.dtype, offset=HEADER_BYTES).copy()
    tokens[at] = token
    header = msgspec.structs.replace(header, xxh3=xxhash.xxh3_64_intdigest(tokens.data))
    path.write_bytes(header.pack() + tokens.tobytes())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for part in manifest["parts"]:
        for record in (part["train"], part["val"]):
            if record["file"] == file:
                record |= {"sha256": sha256_of(path), "xxh3": f"{header.xxh3:016x}"}
    (folder / "manifest.json").write_bytes(encode(msgspec.convert(manifest, Manifest)))
    return HEADER_BYTES + at * header.dtype.itemsize


@pytest.mark.parametrize("token", [512, 65535])
@pytest.mark.parametrize("file", ["train-00001.bin", "val-00000.bin"])
def test_an_id_beyond_the_vocabulary(tiny_folder: Path, tmp_path: Path, file: str, token: int) -> None:
    """The hashes agree and the header's largest id is a lie: only the tokens themselves show it."""
    folder = tmp_path / "tiny-forged"
    shutil.copytree(tiny_folder, folder)
    offset = forge(folder, file, 777, token)
    TokenFolder(folder)
    with pytest.raises(CorruptError) as caught:
        TokenFolder(folder, verify="hash")
    what, _, mend = str(caught.value).splitlines()
    said = f"offset {offset:,}: token 777 is id {token}, expected one below 512, the size of the vocabulary"
    assert what == f"{folder / file}: {said}"
    assert mend.startswith("hint: ") and "millpond tokenize CONFIG --force" in mend


def test_the_largest_id_there_is(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-forged"
    shutil.copytree(tiny_folder, folder)
    forge(folder, "train-00000.bin", 5, 511)
    TokenFolder(folder, verify="hash")


@pytest.fixture
def home(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder.parents[1], tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.slow
def test_the_command_refuses_it_before_a_step(tiny_toml: Path, home: Path) -> None:
    """Although the folder was verified before, as its receipt says."""
    (folder,) = (home / "tokens").iterdir()
    forge(folder, "train-00000.bin", 5, 600)
    chosen = ("--set", f"tokens.folder={folder.name}", *STEPS)
    (receipt,) = (home / "receipts").glob("verify-*")
    record = json.loads(receipt.read_text()) | {"fingerprint": sha256_of(folder / "manifest.json")}
    receipt.write_text(json.dumps(record))
    done = millpond("train", tiny_toml, "--home", home, *chosen)
    assert done.returncode == 4, done.stderr
    assert "token 5 is id 600, expected one below 512" in done.stderr
    assert not (home / "runs").exists()


@pytest.mark.slow
def test_a_folder_of_another_tokenizer(corpus_file: Path, tiny_toml: Path, home: Path, tmp_path: Path) -> None:
    assert millpond("train", tiny_toml, "--home", home, *STEPS).returncode == 0
    (ours,) = (home / "tokens").iterdir()
    other = tmp_path / "other.toml"
    other.write_text(TINY.format(files=corpus_file).replace("vocab_size = 512", "vocab_size = 600"))
    assert millpond("prepare", other, "--home", home).returncode == 0
    (theirs,) = {*(home / "tokens").iterdir()} - {ours}

    done = millpond("train", tiny_toml, "--home", home, *STEPS, "--set", f"tokens.folder={theirs.name}")
    assert done.returncode == 1, done.stderr
    assert f"token_folder: {ours.name} -> {theirs.name}" in done.stderr and "--fresh" in done.stderr

    shutil.rmtree(ours)
    theirs.rename(ours)  # the same name, other tokens
    (home / "runs" / "tiny" / "receipt.json").unlink()
    done = millpond("train", tiny_toml, "--home", home, *STEPS, "--set", f"tokens.folder={ours.name}")
    assert done.returncode == 1, done.stderr
    assert f"{ours}: its fingerprint is" in done.stderr and "--name tiny --fresh" in done.stderr
