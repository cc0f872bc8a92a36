"""Gradients are averaged while the last backward pass runs, each once a step, whatever happens to the pass."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rank_work
import torch
from rank_work import Failure
from ranks import Ranks, ranks
from steps import stepper

from train.machine.ranks import World

SMALL = 2000  # bytes of a bucket: most gradients are larger


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as started:
        yield started


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process learns."""
    return rank_work.learn(World(), 8)


def assert_same(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Both ranks have the same bits, and what one process has."""
    assert np.array_equal(found[0]["gradients"], found[1]["gradients"])
    assert np.array_equal(found[0]["weights"], found[1]["weights"])
    for each in found:
        assert np.allclose(each["gradients"], one["gradients"], rtol=1e-5, atol=1e-7)
        assert each["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert each["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert np.allclose(each["weights"], one["weights"], atol=1e-6)


@pytest.mark.parametrize("size", [4, 2])
def test_the_gradients_are_those_of_one_process(two: Ranks, one: dict[str, Any], size: int) -> None:
    assert_same(two.run(rank_work.learn, size), one)


@pytest.mark.parametrize("variant", ["checkpointed", "scaled", "unused"])
def test_whichever_way_they_are_computed(two: Ranks, variant: str) -> None:
    found = two.run(rank_work.learn_in_buckets, SMALL, 2, variant)
    assert_same(found, rank_work.learn(World(), 8, variant))


@pytest.mark.slow
def test_compiled(two: Ranks, one: dict[str, Any]) -> None:
    found = two.run(rank_work.learn_in_buckets, SMALL, 2, "compiled")
    assert_same(found, one)
    events = found[0]["events"]
    assert events == found[1]["events"]
    head = events.index("reduce")  # made before those of the one compiled graph
    assert events[head - 1 : head + 2] == ["forward", "reduce", "embed"]


def test_it_does_not_matter_how_they_are_bundled(two: Ranks) -> None:
    whole = two.run(rank_work.learn, 4)
    cut = two.run(rank_work.learn_in_buckets, SMALL, 4)
    assert all(np.array_equal(a["weights"], b["weights"]) for a, b in zip(whole, cut, strict=True))


def test_they_are_reduced_while_the_last_backward_pass_runs(two: Ranks) -> None:
    """All buckets but the embedding's, before its gradient is made; after the pass, the loss alone."""
    for found in two.run(rank_work.learn_in_buckets, SMALL, 2):
        events = found["events"]
        buckets = events[: len(events) // 2].count("reduce") - 1
        assert buckets > 10
        step = ["forward", "embed", "forward", *["reduce"] * (buckets - 1), "embed", "reduce", "reduce"]
        assert events == step * 2


def test_alone_there_are_no_hooks() -> None:
    assert not any(parameter._post_accumulate_grad_hooks for parameter in stepper().model.parameters())


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_on_one_rank_is_that_ranks_own_affair(
    two: Ranks, one: dict[str, Any], size: int, error: Exception
) -> None:
    """In its last backward pass, when most buckets have been started: they are not started again."""
    passes = rank_work.SEQUENCES // size // 2
    found = two.run(rank_work.learn_in_buckets, SMALL, size, "", (Failure(1, passes, "embed.weight", error),))
    assert [each["pieces"] for each in found] == [1, 2]
    calm, shaken = (each["events"] for each in found)
    assert calm.count("reduce") == shaken.count("reduce")
    broken = shaken.index("forward", shaken.index("reduce"))
    assert shaken[:broken].count("reduce") == calm.count("reduce") // 2 - 2
    assert_same(found, one)


def test_it_may_run_out_twice_in_a_step_and_on_both(two: Ranks, one: dict[str, Any]) -> None:
    """Each time somewhat later in the pass, and on the other rank before anything was started."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    failures = (
        Failure(0, 1, "head.weight", error),
        Failure(1, 1, "blocks.1.attention.q.weight", error),
        Failure(1, 3, "blocks.0.attention.q.weight", error),
    )
    found = two.run(rank_work.learn_in_buckets, SMALL, 4, "", failures)
    assert [each["pieces"] for each in found] == [2, 4]
    assert_same(found, one)


def test_an_overflow_on_one_rank_skips_the_step_on_all(two: Ranks) -> None:
    found = two.run(rank_work.overflow)
    assert found == [[0.0, 512.0, True]] * 2
