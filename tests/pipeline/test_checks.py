"""What a recipe alone shows is refused before a byte is fetched or read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from harness import TINY
from local_hub import LocalHub

from pipeline.cli.main import main

GPT2 = TINY.replace('tokenizer = "bpe"\nvocab_size = 512\n', "")


@pytest.mark.parametrize("verb", ["prepare", "fetch", "tokenize", "train", "plan"])
@pytest.mark.parametrize(
    ("settings", "says", "fix"),
    [
        (["tokens.tokenizer=bert"], "Unknown tokenizer 'bert': gpt2, bpe, or a .json or .tiktoken file", "tokenizer="),
        (["tokens.tokenizer=gtp2"], "Unknown tokenizer 'gtp2'", "--set tokens.tokenizer=gpt2"),
        (["tokens.tokenizer=none/tokenizer.json"], "tokens.tokenizer: no such file: none/tokenizer.json", "the path"),
        (
            ["tokens.vocab_size=4096"],
            'tokens.vocab_size is 4096, and tokens.tokenizer is "gpt2"',
            "leave vocab_size out",
        ),
        (["tokens.tokenizer=bpe", "tokens.vocab_size=100"], 'a "bpe" tokenizer has at least 258', "vocab_size=4096"),
        (["tokens.forbid=nothing-12345678"], "tokens.forbid: there is no token folder nothing-12345678", "shards ls"),
        (["corpus.filters=lang is en"], "corpus.filters: 'lang is en' is not a condition", "fix"),
        (["tokens.tokenizer=bert", "tokens.forbid=gone"], "Unknown tokenizer 'bert'", "; check the name"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, verb: str, settings: list[str], says: str, fix: str) -> None:
    """The corpus is not there, and nobody has looked."""
    toml, home = tmp_path / "r.toml", tmp_path / "home"
    toml.write_text(GPT2.format(files=tmp_path / "no such file.jsonl"))
    chosen = [word for each in settings for word in ("--set", each)]
    result = CliRunner().invoke(main, [verb, str(toml), *chosen, "--home", str(home)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr and fix in result.stderr
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_training_without_validation_is_refused_and_preparing_is_not(tmp_path: Path, corpus_file: Path) -> None:
    toml, home = tmp_path / "r.toml", str(tmp_path / "home")
    toml.write_text(TINY.format(files=corpus_file))
    none = ["--set", "tokens.val_fraction=0.0", "--home", home]
    for verb in ("train", "plan"):
        result = CliRunner().invoke(main, [verb, str(toml), *none])
        assert result.exit_code == 2, result.output
        assert "training needs validation text and none was selected" in result.stderr
        assert not list((tmp_path / "home").glob("tokens/*"))
    assert CliRunner().invoke(main, ["prepare", str(toml), *none]).exit_code == 0


@pytest.mark.parametrize("bad", ["z.csv", "z.tsv", "z.jsonl", "z.parquet", "z.csv.gz", "z.arrow"])
def test_a_column_that_the_last_file_lacks_is_refused_before_the_first_is_read(tmp_path: Path, bad: str) -> None:
    from tables import PACK, ROWS, written

    rows = {"id": [1, 2], "body": ["one", "two"]}
    plain = bad.removesuffix(".gz")
    name = next(each for each in ROWS if each.endswith(Path(plain).suffix) and each != "lines.json")
    make = ROWS[name]
    table = {"id": [1, 2], "text": ["one", "two"]}
    data = (
        make(table).replace(b"text", b"body") if not name.endswith((".parquet", ".arrow")) else arrow_like(name, rows)
    )
    written(tmp_path, bad, PACK[".gz"](data) if bad.endswith(".gz") else data)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 50)
    toml, home = tmp_path / "r.toml", tmp_path / "home"
    toml.write_text(
        GPT2.format(files=f"{tmp_path}/[az].*[!l]").replace("files = [", f'files = ["{tmp_path}/a.jsonl", ')
    )
    if bad == "z.jsonl":
        toml.write_text(GPT2.format(files=f"{tmp_path}/*.jsonl"))
    result = CliRunner().invoke(main, ["prepare", str(toml), "--home", str(home)])
    assert result.exit_code == 2, result.output
    assert bad in result.stderr and "'text', it has id, body" in result.stderr
    assert not list(home.glob("tokens/*"))


def arrow_like(name: str, rows: dict[str, list[object]]) -> bytes:
    import pyarrow as pa
    from tables import arrow, parquet

    return parquet(pa.table(rows)) if name.endswith(".parquet") else arrow(pa.table(rows))


def test_a_column_that_a_file_of_the_hub_lacks_is_refused_before_any_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for name, column in (("a", "text"), ("b", "text"), ("c", "body")):
        pq.write_table(pa.table({column: ["some text"] * 5000, "score": [1.0] * 5000}), tmp_path / "a.parquet")
        files[f"{name}.parquet"] = (tmp_path / "a.parquet").read_bytes()
    toml, home = tmp_path / "r.toml", tmp_path / "home"
    toml.write_text('[corpus]\nkind = "hub"\nrepo = "org/web"\nfiles = ["*.parquet"]\n[tokens]\nworkers = 1\n')
    with LocalHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.commit("org/web", files)
        for settings, says in (
            ([], "c.parquet: no column 'text'"),
            (['corpus.filters=lang == "en"'], "no column 'lang'"),
        ):
            words = [word for each in settings for word in ("--set", each)]
            result = CliRunner().invoke(main, ["prepare", str(toml), *words, "--home", str(home)])
            assert result.exit_code == 2 and says in result.stderr, result.output
            assert not [*home.rglob("*.parquet"), *home.rglob("*.part"), *home.rglob("*.bin")]
