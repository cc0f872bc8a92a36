"""Several processes learn what one would have learned, save it, stop together, and go on in another number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from harness import assert_same_rows, complains, results, tree
from ranks import Ranks, end_together, ranks
from training import trained

from shards import ConfigError, HostError
from train.config import ModelConfig, TrainConfig
from train.job import Job
from train.machine.ranks import World, _peer_errors, joined
from train.schedule import rank_share
from train.state import checkpoint as checkpoints
from train.telemetry.metrics import read_rows

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    torch.distributed.DistBackendError("NCCL error, unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


def assert_same(ours: Job, theirs: Job) -> None:
    assert_same_rows(results(ours.metrics), results(theirs.metrics), rel=1e-5, grad_norm=1e-3)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """50 steps in one process."""
    job = rank_work.job(tiny_folder, tmp_path_factory.mktemp("alone"), steps=50)
    trained(job)
    return job


@pytest.mark.slow
def test_how_ranks_speak_to_each_other(two: Ranks) -> None:
    found = two.run(rank_work.talk)
    assert [one.pop("calls") for one in found] == [[0], []]
    assert found[0] == found[1]
    assert found[0] == {
        "first": ["from", "0"],
        "most": 7,
        "sum": [0.2, 1.0],
        "gathered": [[0, 9], [1, 9]],
        "average": [[[0.5, 0.5]] * 3, 2.0, [0.0] * 5],
    }


def test_alone_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined() as world:
        found = rank_work.talk(world)
    assert found == {
        "first": ["from", "0"],
        "calls": [0],
        "most": 0,
        "sum": [0.1, 0.0],
        "gathered": [[0, 9]],
        "average": [[[0.0, 0.0]] * 3, 0.0, [0.0] * 5],
    }
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_process_that_ends_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """While the other's reductions are under way."""
    answer = tmp_path / "answer"
    end_together(2, rank_work.end_in_the_middle, answer)
    assert "another process of this run has ended: " in answer.read_text()


@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_fault_of_this_gpu_is_not_the_end_of_another_process(kind: type[RuntimeError]) -> None:
    with pytest.raises(kind, match="device-side assert"), _peer_errors():
        raise kind("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_in_an_exchange_ends_the_process(error: RuntimeError) -> None:
    """Nobody knows whether it was started, so the step must not be repeated."""
    with pytest.raises(HostError, match="out of memory in an exchange with the other processes: "), _peer_errors():
        raise error


def test_two_learn_what_one_does(two: Ranks, alone: Job, tmp_path: Path) -> None:
    """Over 50 steps: losses and evaluations. Rank 0 alone writes and speaks, and writes what one process does."""
    job = rank_work.job(alone.sources[0].folder, tmp_path, steps=50)
    first, second = two.run(rank_work.train, job)
    assert_same(job, alone)
    assert second.events == [] and set(first.events) == {"Started", "Logged", "Evaluated", "Sampled", "Saved", "Ended"}
    assert first.weights == second.weights and first.evaluation == second.evaluation
    assert (first.micro_batch, second.micro_batch) == (4, 4)
    assert tree(tmp_path).keys() == tree(alone.metrics.parent).keys()
    steps = [[row["step"] for row in read_rows(path / "samples.jsonl")] for path in (tmp_path, alone.metrics.parent)]
    assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_going_on_in_another_number(two: Ranks, alone: Job, tmp_path: Path, before: int, after: int) -> None:
    job = rank_work.job(alone.sources[0].folder, tmp_path, steps=50)
    stopped = two.run(rank_work.stop, job, 1, 17) if before == 2 else [rank_work.stop(World(), job, 0, 17)]
    assert stopped == [(143, 17)] * before  # one rank got the signal
    assert checkpoints.load(job.checkpoints / "step-000017").progress.data.position == 17 * 8
    ended = two.run(rank_work.train, job) if after == 2 else [rank_work.train(World(), job)]
    assert len({each.weights for each in ended}) == 1
    assert_same(job, alone)


@pytest.mark.slow
def test_going_on_in_the_same_number_is_exact(two: Ranks, tiny_folder: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout, which each rank draws for itself."""
    calm, stopped = (rank_work.job(tiny_folder, tmp_path / name, dropout=0.1) for name in ("calm", "stopped"))
    expected = two.run(rank_work.train, calm)
    assert two.run(rank_work.stop, stopped, 0, 13) == [(143, 13)] * 2
    assert [each.weights for each in two.run(rank_work.train, stopped)] == [each.weights for each in expected]
    assert results(stopped.metrics) == results(calm.metrics)
    state = checkpoints.load(stopped.checkpoints / "step-000040").state
    assert not torch.equal(state["rng.cpu"], state["rng.cpu.1"])
    ended = rank_work.train(World(), rank_work.job(tiny_folder, tmp_path / "alone", dropout=0.1))
    assert ended.weights != expected[0].weights


@pytest.mark.slow
def test_the_newest_checkpoint_is_damaged(two: Ranks, tiny_folder: Path, tmp_path: Path) -> None:
    """Rank 0 sees it, and all go back to the one before."""
    calm, job = (rank_work.job(tiny_folder, tmp_path / name, dropout=0.1) for name in ("calm", "damaged"))
    expected = two.run(rank_work.train, calm)
    two.run(rank_work.stop, job, 0, 13)
    weights = job.checkpoints / "step-000013" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [each.weights for each in two.run(rank_work.train, job)] == [each.weights for each in expected]


def share_of(world_size: int, **settings: Any) -> TrainConfig:
    train = TrainConfig(**{"steps": 10, "batch_tokens": 64 * 12, **settings})
    return rank_share(ModelConfig(seq_len=64), train, world_size)


def test_what_a_rank_does_of_a_step() -> None:
    assert share_of(1) == TrainConfig(steps=10, batch_tokens=64 * 12)
    found = share_of(3, batch_ramp=(64 * 6,), micro_batch=2)
    assert (found.batch_tokens, found.batch_ramp, found.steps) == (64 * 4, (64 * 2,), 10)
    with complains(
        ConfigError,
        "5 processes",
        "12 sequences",
        "--nproc-per-node 4",
        "--set train.batch_tokens=960",
    ):
        share_of(5)
    with complains(
        ConfigError,
        "train.micro_batch is 6, each of 3 processes has 4 sequences of a step",
        "hint: choose a divisor of 4, or 0 to have it chosen",
    ):
        share_of(3, micro_batch=6)
