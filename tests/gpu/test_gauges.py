"""What only a card can show: its watts and energy, its memory, and a measured peak beside the table's."""

import time

import pytest
import torch

from train.machine.device import memory_used
from train.telemetry.flops import measured_peak, peak
from train.telemetry.power import SECONDS, gpu_power

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def work(seconds: float) -> None:
    a = torch.randn(4096, 4096, device=CUDA)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ a
        torch.cuda.synchronize()


def test_energy_is_watts_times_seconds() -> None:
    power = gpu_power([CUDA])
    if power is None:
        pytest.skip("the driver tells nothing of this card")
    before, began = power.joules(), time.perf_counter()
    work(3 * SECONDS)
    after, seconds = power.joules(), time.perf_counter() - began
    power.close()
    assert before is not None and after is not None
    assert 5 < (after - before) / seconds < 1500


def test_the_peak_of_memory_is_that_since_the_last_look() -> None:
    memory_used(CUDA)
    torch.empty(1 << 28, dtype=torch.uint8, device=CUDA)
    assert memory_used(CUDA) >= 1 << 28
    assert memory_used(CUDA) < 1 << 28


def test_what_is_measured_is_near_the_table_and_not_over_it() -> None:
    known = peak(CUDA, torch.float16)
    found = measured_peak(CUDA, torch.float16)
    assert found > 1e11
    if known.source == "table":
        assert 0.4 < found / known.flops < 1.1
