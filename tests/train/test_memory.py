"""How much of a GPU's memory a run may take, and which errors say that it ran out."""

import pytest
import torch

from train.machine.memory import cap_memory, is_out_of_memory


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 1)], ids=str)
def test_the_limit_is_of_one_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """torch refuses a device without an index here."""
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given))
    cap_memory(device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 << 30, 24 << 30))  # a run of this process before it
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 << 30)  # has left what torch has cached
    cap_memory(device)
    assert limits == [(pytest.approx(0.46), device.index or 0)] * 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError("out of memory"), False),
    ],
    ids=str,
)
def test_what_says_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
