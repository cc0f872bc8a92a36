"""Documents' ends and mixtures, against the plainest way to find them."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import counting_stream

from shards import ConfigError, CorruptError, RefusedError, Shard, ShardWriter, TokenFolder, TokenStream
from shards.header import Placement
from shards.writer import sidecar_of
from train.data.document_ends import ends_of
from train.data.loader import TokenLoader
from train.data.order import Interleave, OrderName, WindowOrder
from train.data.windows import FolderWindows, Mixture, position_of

EOT = 99


def text_stream(folder: Path, shards: list[list[int]], placement: Placement) -> TokenStream:
    """Shards of documents of so many tokens each, and their end-of-text."""
    random, opened = np.random.default_rng(0), []
    for i, sizes in enumerate(shards):
        documents = [random.integers(0, EOT, size).tolist() for size in sizes]
        texts = [[EOT, *ids] if placement == "before" else [*ids, EOT] for ids in documents]
        starts = np.cumsum([0, *map(len, texts)])[:-1]
        path = folder / f"train-{i:05}.bin"
        with ShardWriter(path, vocab_size=100, eot=EOT, placement=placement, fingerprint="00" * 32) as shard:
            shard.append(np.array([*chain(*texts)], np.uint16), starts, np.zeros(len(texts), np.uint64))
            record = shard.seal()
        if record.nbytes:  # one without tokens is not on disk
            opened.append(Shard(path))
    return TokenStream(opened, np.dtype("<u2"))


def ends_in(inputs: list[list[int]], befores: list[int], placement: Placement) -> list[int]:
    """One token at a time: a document begins with its end-of-text, or behind the end-of-text of the one before."""
    ends, at = [0], 0
    for row, before in zip(inputs, befores, strict=True):
        for i, token in enumerate(row):
            begins = token == EOT if placement == "before" else (row[i - 1] if i else before) == EOT
            if (begins or i == 0) and at not in ends:
                ends.append(at)
            at += 1
    return [*ends, at]


def without_padding(documents: torch.Tensor) -> list[int]:
    """The last end is repeated, so that there are few shapes."""
    pieces = len(documents) - 1
    assert pieces & (pieces - 1) == 0
    found: list[int] = documents.unique().tolist()
    assert documents.tolist() == found + found[-1:] * (len(documents) - len(found))
    return found


@settings(deadline=None, max_examples=25)
@given(
    shards=st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=4).filter(
        lambda shards: sum(size + 1 for sizes in shards for size in sizes) > 12
    ),
    placement=st.sampled_from(["before", "after"]),
    seq_len=st.integers(2, 11),
    batch_size=st.integers(1, 5),
    order=st.sampled_from(["shuffled", "sequential"]),
)
def test_ends_of_documents(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[list[int]],
    placement: Placement,
    seq_len: int,
    batch_size: int,
    order: OrderName,
) -> None:
    stream = text_stream(tmp_path_factory.mktemp("shards"), shards, placement)
    tokens = stream.window(0, len(stream)).tolist()
    windows = FolderWindows(stream, seq_len, 3, order)
    with TokenLoader(windows, batch_size, documents=True) as loader:
        for i in range(4):
            batch = loader.next()
            picked = WindowOrder(windows.count, 3, order).at(i * batch_size, batch_size).tolist()
            befores = [tokens[window * seq_len - 1] if window else EOT for window in picked]
            assert batch.documents is not None
            assert batch.documents.dtype == torch.int32
            assert without_padding(batch.documents) == ends_in(batch.inputs.tolist(), befores, placement)


def test_ends_of_documents_of_a_real_folder(tiny_folder: Path) -> None:
    folder = TokenFolder(tiny_folder)
    eot = folder.tokenizer.eot
    with TokenLoader(FolderWindows.of(folder, "train", 64, 1), 16, documents=True) as loader:
        seen = 0
        for _ in range(50):
            batch = loader.next()
            assert batch.documents is not None
            begins = batch.inputs == eot
            seen += int(begins[:, 1:].sum())
            begins[:, 0] = True
            assert without_padding(batch.documents) == [*torch.nonzero(begins.flatten())[:, 0].tolist(), 16 * 64]
    assert seen > 50


@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_every_batch_of_a_folder_has_one_shape(tiny_folder: Path, batch_size: int) -> None:
    """Another shape in mid-run is a minute of compiling. 1.3 documents begin in a window here, and in some many."""
    windows = FolderWindows.of(TokenFolder(tiny_folder), "train", 256, 1)
    assert 1 < windows.documents_per_window < 3
    with TokenLoader(windows, batch_size, documents=True) as loader:
        batches = [loader.next().documents for _ in range(2 * windows.count // batch_size)]
    pieces = {len(each) - 1 for each in batches if each is not None}
    assert len(pieces) == 1
    assert pieces.pop() <= 4 * batch_size * (1 + windows.documents_per_window) + 16


def test_a_batch_of_many_documents_has_all_of_them() -> None:
    assert ends_of(np.arange(1, 100), 1, 100).tolist() == list(range(101)) + [100] * 28


def test_no_one_is_told_where_documents_end_without_asking(tiny_folder: Path) -> None:
    with TokenLoader(FolderWindows.of(TokenFolder(tiny_folder), "train", 64, 1), 2) as loader:
        assert loader.next().documents is None


def test_an_index_that_goes_back(tmp_path: Path) -> None:
    stream = text_stream(tmp_path, [[20, 20, 20]], "before")
    sidecar = sidecar_of(stream.shards[0].path)
    index = np.load(sidecar)
    index["start"] = index["start"][::-1].copy()
    np.save(sidecar, index)
    with (
        TokenLoader(FolderWindows(stream, 8, 0), 1, documents=True) as loader,
        pytest.raises(CorruptError, match="do not begin one after the other"),
    ):
        loader.next()


def mixture(folder: Path, sizes: list[int], weights: list[float], seed: int = 5, seq_len: int = 3) -> Mixture:
    """Folders of so many windows, whose tokens count up from 1,000 times the folder's number."""
    folders = []
    for i, size in enumerate(sizes):
        (folder / str(i)).mkdir()
        stream = counting_stream(folder / str(i), [size * seq_len + 1], first_id=1000 * i)
        folders.append(FolderWindows(stream, seq_len, seed, fingerprint=f"{i}" * 64, tokenizer="gpt2"))
    return Mixture(folders, weights)


def first_tokens(windows: Mixture, position: int, count: int) -> list[int]:
    rows = [np.empty(windows.seq_len + 1, windows.dtype) for _ in range(count)]
    windows.read(position, rows)
    assert all(np.array_equal(row, np.arange(row[0], row[0] + len(row))) for row in rows)
    return [int(row[0]) for row in rows]


WEIGHTS = st.lists(st.one_of(st.integers(1, 20), st.sampled_from([0.5, 0.25, 1.5, 0.1])), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(weights=WEIGHTS, data=st.data())
def test_shares_are_exact_and_no_window_comes_twice_before_all_came(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=len(weights), max_size=len(weights)))
    mixed = mixture(tmp_path_factory.mktemp("mixture"), sizes, weights)
    epoch = first_tokens(mixed, 0, mixed.count)
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = [(token - 1000 * i) // 3 for token in epoch if token // 1000 == i]
        assert len(mine) * sum(weights) == pytest.approx(mixed.count * weight)
        assert mine == WindowOrder(size, 5).at(0, len(mine)).tolist()  # as a run over this folder alone sees them
        assert len(mine) >= size
        times = Counter(mine).values()
        assert max(times) - (min(times) if len(times) == size else 0) <= 1


@settings(deadline=None, max_examples=25)
@given(weights=WEIGHTS, start=st.integers(0, 10**12), counts=st.lists(st.integers(0, 60), max_size=5))
def test_an_interleave_is_even_and_any_way_of_asking_gives_the_same(
    weights: list[float], start: int, counts: list[int]
) -> None:
    interleave, at, pieces = Interleave(weights), start, []
    for count in counts:
        pieces += interleave.at(at, count).tolist()
        at += count
    assert pieces == interleave.at(start, at - start).tolist()
    given_before, given_after = interleave.before(start), interleave.before(at)
    for folder, share in enumerate(interleave.shares):
        assert given_after[folder] - given_before[folder] == pieces.count(folder)
        assert abs(given_after[folder] * interleave.period - at * share) <= interleave.period * (len(weights) + 1) / 2


@settings(deadline=None, max_examples=20)
@given(
    weights=WEIGHTS,
    start=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_a_mixture_does_not_depend_on_batch_or_world_size_and_goes_on_anywhere(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], start: int, changes: list[tuple[int, int]]
) -> None:
    mixed = mixture(tmp_path_factory.mktemp("mixture"), [17, 40, 9, 23][: len(weights)], weights)
    found: list[int] = []
    state = mixed.state(start)
    for batch_size, world_size in changes:
        position = position_of(mixed, state)
        for rank in range(world_size):
            with TokenLoader(mixed, batch_size, position=position, rank=rank, world_size=world_size) as loader:
                found += loader.next().inputs[:, 0].tolist()
        state = loader.state()
    assert found == first_tokens(mixed, start, state.position - start)


def test_ends_of_documents_in_a_mixture(tmp_path: Path) -> None:
    folders = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        folders.append(FolderWindows(text_stream(tmp_path / str(i), [[5 + i, 9, 2] * 9], "before"), 8, 0))
    with TokenLoader(Mixture(folders, [2, 1]), 5, documents=True) as loader:
        for _ in range(9):
            batch = loader.next()
            assert batch.documents is not None
            assert without_padding(batch.documents) == ends_in(batch.inputs.tolist(), [0] * 5, "before")


def test_a_mixture_is_announced_as_it_is_read(tmp_path: Path) -> None:
    mixture(tmp_path, [40, 7], [3, 1]).will_need(35, 20)  # the system's call refuses addresses that it should not get


def test_a_state_of_another_mixture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = mixture(tmp_path / "a", [17, 40], [1, 2]), mixture(tmp_path / "b", [17, 40], [2, 1])
    with pytest.raises(RefusedError, match="fingerprint"):
        position_of(other, one.state(3))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "above 0"),
        ([1, float("nan")], "above 0"),
        ([1, -2], "above 0"),
        ([], "above 0"),
        ([0.123456789, 1], "rounder numbers"),
    ],
)
def test_weights_that_are_none(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Interleave(weights)


def test_folders_that_do_not_fit_together(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, [100])
    first = FolderWindows(stream, 5, 0, tokenizer="aa")
    for other, message in (
        (FolderWindows(stream, 5, 0, tokenizer="bb"), r"different tokenizers \(sha256 of their ranks\): aa, bb"),
        (FolderWindows(stream, 4, 0, tokenizer="aa"), "different window lengths: 5, 4"),
        (FolderWindows(stream, 5, 1, tokenizer="aa"), "different seeds: 0, 1"),
        (FolderWindows(stream, 5, 0, "sequential", tokenizer="aa"), "different orders: shuffled, sequential"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mixture([first, other], [1, 1])
    with complains(ConfigError, "2 folders", "1 weights"):
        Mixture([first, first], [1])


def test_the_tokenizer_of_a_folder_is_what_its_manifest_says(tiny_folder: Path) -> None:
    folder = TokenFolder(tiny_folder)
    windows = FolderWindows.of(folder, "val", 32, 0)
    assert windows.tokenizer == folder.manifest.tokenizer.ranks_sha256
    assert windows.state(0).fingerprint == folder.manifest.fingerprint
