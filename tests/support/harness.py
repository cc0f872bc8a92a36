"""What several test files need: a tiny recipe, a pipeline under a home of its own, messages compared word for word."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config import Recipe
from pipeline.layout import Layout
from pipeline.stages import Pipeline
from pipeline.terminal import Terminal
from shards.errors import MillpondError

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
sample_every = 0
sample_tokens = 8
checkpoint_every = 10
log_every = 1
"""


def pipeline_of(recipe: Recipe, home: Path) -> Pipeline:
    return Pipeline(Layout(home), "CONFIG", recipe, Terminal())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def complains(kind: type[MillpondError], *lines: str) -> Iterator[None]:
    """The block raises a `kind` whose whole message is `lines`."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert str(caught.value).splitlines() == list(lines)


def command(*arguments: object) -> list[str]:
    """The command line that runs millpond as a user would."""
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def millpond(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run millpond in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
