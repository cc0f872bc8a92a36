"""The order: every window once an epoch, the same for ever. Its numbers are part of every run, so they are frozen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.order import CHUNK, ORDER_VERSION, Permutation, WindowOrder


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_a_bijection(n: int, seed: int, epoch: int) -> None:
    found = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))


def test_frozen_values() -> None:
    """If these change, ORDER_VERSION must: a run that is resumed would repeat some windows and lose others."""
    assert ORDER_VERSION == 1
    assert Permutation(10, 1337, 0)(np.arange(10)).tolist() == GOLDEN_10
    assert Permutation(1_000_003, 7, 3)(np.arange(8)).tolist() == GOLDEN_MILLION


GOLDEN_10 = [4, 6, 5, 3, 0, 9, 1, 7, 2, 8]
GOLDEN_MILLION = [417595, 750549, 209334, 668367, 57369, 793118, 967519, 875576]


@pytest.mark.parametrize("position", [-1, 100, 2**40])
def test_outside_is_an_error_and_no_endless_walk(position: int) -> None:
    with pytest.raises(IndexError, match="of a permutation of 100"):
        Permutation(100, 0, 0)(np.array([position]))


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 300), start=st.integers(0, 2000), counts=st.lists(st.integers(0, 400), max_size=5))
def test_any_way_of_asking_gives_the_same(n: int, start: int, counts: list[int]) -> None:
    order = WindowOrder(n, 5)
    pieces, at = [], start
    for count in counts:
        pieces += order.at(at, count).tolist()
        at += count
    epochs = [Permutation(n, 5, epoch)(np.arange(n)).tolist() for epoch in range(at // n + 1)]
    assert pieces == [epochs[k // n][k % n] for k in range(start, at)]


def test_sequential_is_the_stream_again_and_again() -> None:
    order = WindowOrder(CHUNK + 100, 1, "sequential")
    assert np.array_equal(order.at(0, 2 * order.windows), np.tile(np.arange(order.windows), 2))


def test_reading_ahead_into_the_next_chunk_computes_neither_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order, computed = WindowOrder(3 * CHUNK, 1), []
    monkeypatch.setattr(
        "train.data.order.Permutation", lambda *of: computed.append(of) or (lambda positions: positions)
    )
    for position in range(0, 2 * CHUNK, 32):
        order.at(position, 32)
        order.at(position + 128, 32)
    assert len(computed) == 3


def test_every_epoch_is_another_order() -> None:
    order = WindowOrder(CHUNK + 100, 1)
    epochs = [order.at(e * order.windows, order.windows) for e in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(order.windows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.count_nonzero(epochs[0] == epochs[1]) < 20
    assert not np.array_equal(epochs[0], WindowOrder(order.windows, 2).at(0, order.windows))


def test_no_pattern_between_neighbours() -> None:
    """Differences of neighbours fall evenly into 64 bins: chi2 has 63 degrees of freedom, a weak round 10,000."""
    n = 249_999
    statistics = []
    for seed in range(5):
        found = WindowOrder(n, seed).at(0, n)
        bins = np.bincount(((found[1:] - found[:-1]) % n) * 64 // n, minlength=64)
        expected = (n - 1) / 64
        statistics.append(float(((bins - expected) ** 2 / expected).sum()))
    assert 30 < np.mean(statistics) < 100, statistics
