"""The whole of it on a GPU, as a user runs it: plan, train compiled, kill, resume, evaluate, sample."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import command

from train.telemetry.metrics import read_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LONGEST = 240.0
GRAPHS = re.compile(r" [34] graphs compiled")  # the layers in training and evaluation, the loss in one shape or in two
RECIPE = """
[corpus]
kind = "files"
name = "docs"
files = ["{files}"]
[tokens]
tokenizer = "bpe"
vocab_size = 2048
val_fraction = 0.1
workers = 1
[model]
n_layer = 2
n_head = 2
d_model = 256
seq_len = 256
[optim]
lr = 0.01
[train]
steps = 60
batch_tokens = 8192
micro_batch = 8
eval_every = 20
eval_tokens = 16384
sample_every = 30
sample_tokens = 8
checkpoint_every = 10
log_every = 1
"""


class Place:
    """One home and one recipe; commands run in processes of their own."""

    def __init__(self, root: Path, corpus: Path) -> None:
        self.home, self.toml = root / "home", root / "docs.toml"
        self.toml.write_text(RECIPE.format(files=corpus))

    def millpond(self, *arguments: object) -> str:
        """What the command printed; it must end well."""
        done = subprocess.run(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout and "torch.compile failed" not in done.stdout
        return done.stdout

    def train(self, name: str, *settings: str) -> str:
        return self.millpond(*self.training(name, *settings))

    def training(self, name: str, *settings: str) -> list[object]:
        return ["train", self.toml, "--name", name, *(word for each in settings for word in ("--set", each))]

    def command(self, *arguments: object) -> list[str]:
        return command(*arguments, "--home", self.home)

    def rows(self, name: str, what: str = "loss") -> dict[int, Any]:
        return {row["step"]: row[what] for row in read_rows(self.home / "runs" / name / "metrics.jsonl") if what in row}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Place:
    return Place(tmp_path_factory.mktemp("gpu"), corpus_file)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    """A run as anybody's: compiled, in bf16 where the GPU has it."""
    return place.train("whole")


def test_a_whole_run(place: Place, whole: str) -> None:
    losses, evaluations = place.rows("whole"), place.rows("whole", "val_loss")
    assert list(losses) == list(range(1, 61))
    assert losses[60] < losses[1] - 1.0
    assert evaluations[60] < evaluations[0] - 1.0
    assert GRAPHS.search(whole)


def test_killed_and_resumed_it_learns_the_same(place: Place, whole: str) -> None:
    process = subprocess.Popen(place.command(*place.training("killed")), stdout=subprocess.DEVNULL)
    metrics, began = place.home / "runs" / "killed" / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() < began + LONGEST:
        if metrics.exists() and any(row["step"] >= 15 for row in read_rows(metrics)):
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    assert "resumes at step" in place.train("killed")
    found, expected = place.rows("killed"), place.rows("whole")
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=0.05)
    assert list(found.values())[:5] == pytest.approx(list(expected.values())[:5], abs=2e-3)


def test_evaluate_and_sample(place: Place, whole: str) -> None:
    said = place.millpond("evaluate", "whole", "--json")
    found = json.loads(said[said.index("{") :])
    assert found["step"] == 60
    assert found["val_loss"] == pytest.approx(place.rows("whole", "val_loss")[60], abs=0.3)  # of more tokens
    assert place.millpond("sample", "whole", "--prompt", "The").strip()


def test_plan_finds_the_micro_batch(place: Place) -> None:
    settings = ("train.micro_batch=0", "train.batch_tokens=2048", "train.compile=off")
    said = place.millpond("plan", place.toml, *(word for each in settings for word in ("--set", each)))
    assert "training with 8 sequences at once: " in said and "evaluation with " in said
    assert "estimated instead" not in said and " tok/s, " in said
    assert json.loads((place.home / "fits.json").read_text())[0]["fit"]["rates"]


@pytest.mark.parametrize("compiled", ["on", "off"])
def test_masks_and_a_ramp_compile_no_graph_more(place: Place, compiled: str) -> None:
    settings = ("train.document_mask=true", "train.batch_ramp=[2048,4096]")
    said = place.train(f"masked-{compiled}", *settings, f"train.compile={compiled}")
    losses = place.rows(f"masked-{compiled}")
    assert losses[60] < losses[1] - 0.8
    if compiled == "on":
        assert GRAPHS.search(said)
        return
    assert "graphs compiled" not in said
    graphs = place.rows("masked-on")
    assert list(losses.values())[:10] == pytest.approx(list(graphs.values())[:10], abs=2e-2)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_in_another_precision_it_learns_the_same(place: Place, whole: str, precision: str) -> None:
    place.train(precision, f"train.precision={precision}")
    found, expected = place.rows(precision), place.rows("whole")
    assert found[60] == pytest.approx(expected[60], abs=0.2)


def test_gpt2_with_adamw(place: Place) -> None:
    place.train("gpt2", "model.family=gpt2", "optim.name=adamw", "optim.lr=0.002")
    losses = place.rows("gpt2")
    assert losses[60] < losses[1] - 0.8


def test_a_capped_memory_halves_the_micro_batch_and_not_the_step(place: Place) -> None:
    """With so little memory that 32 sequences do not fit, the same losses come of smaller pieces."""
    code = (
        "import torch, sys; from train import session; session.cap_memory = lambda device: "
        "torch.cuda.set_per_process_memory_fraction({} / torch.cuda.mem_get_info()[1], device); "
        "from pipeline.cli.main import main; main(sys.argv[1:])"
    )
    wide = ("model.n_layer=8", "train.micro_batch=32", "train.steps=12", "train.compile=off")
    arguments = [str(word) for word in (*place.training("capped", *wide), "--home", place.home)]
    place.train("free", *wide)
    peak = max(place.rows("free", "memory_gb").values()) * 1e9
    done = subprocess.run(
        [command()[0], "-c", code.format(0.6 * peak), *arguments], capture_output=True, text=True, timeout=LONGEST
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 32 sequences at once" in done.stderr
    found, expected = (list(place.rows(name).values()) for name in ("capped", "free"))
    assert found == pytest.approx(expected, abs=3e-2)
