"""The loader where there is a GPU: what arrives is what was read, copies overlap, and no slot is touched too early."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import counting_stream

from train.data.loader import TokenLoader
from train.data.staging import CudaSlot, SideStream
from train.data.windows import FolderWindows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CYCLES = 400_000_000  # some 200 ms of a GPU's clock


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield torch.device("cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("documents", [False, True])
def test_what_arrives_is_what_the_cpu_gets(tmp_path: Path, device: torch.device, documents: bool) -> None:
    windows = FolderWindows(counting_stream(tmp_path, [30_000, 35_000]), 100, 3)
    with (
        TokenLoader(windows, 7, documents=documents) as here,
        TokenLoader(windows, 7, documents=documents, device=device) as there,
    ):
        for _ in range(200):  # ids above 32,767 are negative on the wire
            ours, theirs = here.next(), there.next()
            assert theirs.inputs.device.type == "cuda" and theirs.inputs.dtype == torch.int64
            assert torch.equal(ours.inputs, theirs.inputs.cpu())
            assert torch.equal(ours.targets, theirs.targets.cpu())
            if documents:
                assert ours.documents is not None and theirs.documents is not None
                assert torch.equal(ours.documents, theirs.documents.cpu())


def test_a_gpu_that_is_far_behind_gets_every_batch_whole(tmp_path: Path, device: torch.device) -> None:
    """The host runs round the ring several times while the GPU has not begun: nothing may be overwritten."""
    windows = FolderWindows(counting_stream(tmp_path, [60_000]), 50, 1)
    with TokenLoader(windows, 4, depth=3) as here, TokenLoader(windows, 4, depth=3, device=device) as there:
        torch.cuda._sleep(CYCLES)
        batches = [there.next() for _ in range(12)]
        for batch in batches:
            assert torch.equal(batch.inputs.cpu(), here.next().inputs)


def test_a_slot_is_reclaimed_only_behind_its_copy(device: torch.device) -> None:
    side = SideStream(device)
    slot = CudaSlot(2, 8, np.dtype("<u2"), device, side)
    for row in slot.rows:
        row[...] = 60_000
    with torch.cuda.stream(side.stream):
        torch.cuda._sleep(CYCLES)  # the copy is queued behind this
    slot.send()
    assert not side.stream.query()
    slot.reclaim()
    assert side.stream.query()
    for row in slot.rows:
        row[...] = 1
    assert slot.deliver().unique().tolist() == [60_000]
    slot.drain()


def test_the_next_copy_waits_for_the_widening_of_the_last(device: torch.device) -> None:
    slot = CudaSlot(2, 8, np.dtype("<u4"), device, SideStream(device))
    found = []
    for value in (70_000, 2**32 - 1):
        for row in slot.rows:
            row[...] = value
        slot.send()
        torch.cuda._sleep(CYCLES)  # the model is behind: the widening is queued after this
        found.append(slot.deliver())
        slot.reclaim()
    assert [tokens.unique().tolist() for tokens in found] == [[70_000], [2**32 - 1]]
    slot.drain()


def test_a_late_copy_is_counted_and_the_host_does_not_wait_for_it(device: torch.device) -> None:
    side = SideStream(device)
    slot = CudaSlot(2, 8, np.dtype("<u2"), device, side)
    slot.send()
    slot.deliver()  # a kernel is loaded at its first call, and that waits for the device
    torch.cuda.synchronize()
    before = side.waited()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side.stream):
        began.record(side.stream)
        torch.cuda._sleep(CYCLES)
        ended.record(side.stream)
    slot.send()
    slot.deliver()
    assert side.waited() == before  # not known yet
    torch.cuda.synchronize()
    assert side.waited() - before == pytest.approx(began.elapsed_time(ended) / 1000, rel=0.2)
    slot.drain()


def test_copies_run_ahead_of_the_model(tmp_path: Path, device: torch.device) -> None:
    """While the GPU computes, the ring's next batches reach it: the wait for them is next to nothing."""
    windows = FolderWindows(counting_stream(tmp_path, [60_000]), 50, 1)
    with TokenLoader(windows, 4, device=device) as loader:
        for _ in range(20):
            loader.next()
            torch.cuda._sleep(CYCLES // 20)
        torch.cuda.synchronize()
        assert loader.stats().transfer_wait_s < 0.02  # of 200 ms; a wait for nothing measures some us
