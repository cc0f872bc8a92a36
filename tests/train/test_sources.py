"""Several folders as one: exact shares of each in its own order in training, of its first windows in evaluation."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import complains

from shards import RefusedError, TokenFolder
from train.config import ModelConfig, TrainConfig
from train.data.sources import OpenSources, Source
from train.data.windows import FolderWindows, Windows
from train.evaluate import evaluate, measure
from train.model.gpt import Model

TRAIN = TrainConfig(steps=1, seed=3)
T = 32


@pytest.fixture
def sources(tiny_folder: Path, tmp_path: Path) -> tuple[Source, Source]:
    shutil.copytree(tiny_folder, tmp_path / "other")
    return Source(tiny_folder, 5, 0.7), Source(tmp_path / "other", 2, 0.3)


def rows(windows: Windows, count: int) -> list[list[int]]:
    found = np.empty((count, T + 1), windows.dtype)
    windows.read(0, list(found))
    return found.tolist()


def test_shares_are_exact_and_each_folder_comes_in_its_own_order(sources: tuple[Source, Source]) -> None:
    opened = OpenSources(sources, T, verify="hash")
    assert opened.parts == 7
    alone = [
        iter(rows(FolderWindows.of(TokenFolder(one.folder, parts=one.parts), "train", T, TRAIN.seed), 400))
        for one in sources
    ]
    waiting, taken = [next(one) for one in alone], [0, 0]
    for number, row in enumerate(rows(opened.training(TRAIN), 500), 1):
        which = waiting.index(row)
        waiting[which] = next(alone[which])
        taken[which] += 1
        if number % 10 == 0:
            assert taken == [7 * number // 10, 3 * number // 10]


def test_one_folder_is_no_mixture(sources: tuple[Source, Source]) -> None:
    assert isinstance(OpenSources(sources[:1], T).training(TRAIN), FolderWindows)


def test_the_loss_of_several_is_that_of_all_their_tokens(sources: tuple[Source, Source]) -> None:
    opened = OpenSources(sources, T)
    torch.manual_seed(0)
    model = Model(ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=T), 512)
    windows = [FolderWindows.of(folder, "val", T, 0, "sequential") for folder in opened.folders]
    assert windows[0].count > 2 * windows[1].count
    lengths = opened.tokenizer.byte_lengths
    some = measure(opened, model, 100 * T, 16, nullcontext, document_mask=False)
    every = measure(opened, model, 0, 16, nullcontext, document_mask=False)
    for found, counts in ((some, (70, min(30, windows[1].count))), (every, [one.count for one in windows])):
        parts = [
            evaluate(model, one, lengths, count * T, 16, nullcontext)
            for one, count in zip(windows, counts, strict=True)
        ]
        assert found.tokens == sum(counts) * T
        assert [loss for _, loss in found.by_folder] == [part.loss for part in parts]
        assert found.loss == pytest.approx(sum(part.nats for part in parts) / found.tokens)
        assert found.nbytes == sum(part.nbytes for part in parts)
    assert found.row().keys() == {"val_loss", "val_bpb", "val_tokens", "val_loss_by_folder"}
    single = measure(OpenSources(sources[:1], T), model, 64, 16, nullcontext, document_mask=False)
    assert single.row().keys() == {"val_loss", "val_bpb", "val_tokens"}


def test_only_what_was_pinned_counts(sources: tuple[Source, Source]) -> None:
    tokens = sum(len(shard.tokens) for shard in TokenFolder(sources[1].folder, parts=1).shards("val"))
    said = f"split val has {tokens:,} tokens, one window takes {tokens + 1:,}"
    with complains(RefusedError, said, "corpus.val_files"):
        OpenSources([sources[0], sources[1]._replace(parts=1)], tokens)
