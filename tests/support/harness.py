"""What several test files need: a tiny recipe, a pipeline under a home of its own, messages compared word for word."""

import io
import resource
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from pipeline.cli.main import main
from pipeline.config import Recipe
from pipeline.home.layout import Layout
from pipeline.stages import Pipeline
from pipeline.terminal import Terminal
from prepare.corpus.python_docs import docstrings
from shards.errors import MillpondError
from train.telemetry.metrics import read_rows

TINY = """
[corpus]
kind = "files"
name = "tiny"
files = ["{files}"]
[tokens]
tokenizer = "bpe"
vocab_size = 512
val_fraction = 0.1
part_tokens = 40_000
workers = 1
[model]
family = "modern"
n_layer = 2
n_head = 2
d_model = 32
seq_len = 32
[train]
steps = 60
batch_tokens = 256
eval_every = 20
eval_tokens = 2048
final_eval_tokens = 4096
sample_every = 0
sample_tokens = 8
checkpoint_every = 10
log_every = 1
"""


def run(*arguments: object, code: int = 0) -> Result:
    """The command in this process; it must end with this exit code."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def pipeline_of(recipe: Recipe, home: Path) -> Pipeline:
    return Pipeline(Layout(home), "CONFIG", recipe, Terminal())


def prepared(recipe: Recipe, home: Path) -> Path:
    """The recipe's token folder."""
    (folder,) = pipeline_of(recipe, home).prepare()
    return folder


def results(rows: Path) -> list[dict[str, Any]]:
    """The rows of a run's file, without what a clock or a gauge says: that is another time each time."""
    from train.telemetry.meter import GAUGES

    return [{key: value for key, value in row.items() if key not in GAUGES} for row in read_rows(rows)]


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float, **others: float) -> None:
    """The same fields, and numbers that differ by at most `rel` of their size; `others` says how far for one field."""
    for row, its in zip(found, expected, strict=True):
        assert row.keys() == its.keys()
        for field, value in its.items():
            assert row[field] == pytest.approx(value, rel=others.get(field, rel)), (its["step"], field)


def stdlib_texts() -> list[str]:
    """About 2,000 real documents, 1 MB: the standard library's own docstrings, which every Python has."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += [text for text in docstrings(path.read_text("utf-8")) if len(text) > 80]
    assert len(found) > 1000
    return found


def parquet(texts: list[str]) -> bytes:
    """A parquet file of `texts` and a column that nobody asks for, 50 rows a group."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "url": ["x"] * len(texts)}), out, row_group_size=50)
    return out.getvalue()


def tree(folder: Path, under: str = "") -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, with its bytes; the names begin with `under`."""
    found = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                found[str(under / path.relative_to(folder))] = path.read_bytes()
        except FileNotFoundError:  # somebody works here
            continue
    return found


def litter(home: Path) -> list[str]:
    """What a finished prepare must not leave under `home`; locks are there for the next one."""
    marks = (".tmp", ".part", ".parts", ".wrong", ".incomplete")
    found = [path for path in home.rglob("*") if path.name.startswith(".") or path.name.endswith(marks)]
    return sorted(str(path.relative_to(home)) for path in found if not path.name.endswith(".lock"))


@contextmanager
def files_no_longer_than(nbytes: int) -> Iterator[None]:
    """As on a full disk, writing beyond `nbytes` of a file fails; the kernel's signal is ignored for the error to come.

    pytest's own output may be a file that is longer: nothing of it may be written in the block.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def complains(kind: type[MillpondError], *facts: str) -> Iterator[pytest.ExceptionInfo[MillpondError]]:
    """The block raises exactly a `kind`, whose message has the facts: paths, fields, numbers, commands."""
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind
    states(str(caught.value), *facts)


def states(text: str, *facts: str) -> None:
    """The text has all the facts, whatever its sentences are."""
    assert not [fact for fact in facts if fact not in text], text


def command(*arguments: object) -> list[str]:
    """The command line that runs millpond as a user would."""
    return [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)]


def millpond(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run millpond in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
