"""What a run costs: rates, watts and energy from a card's own meter, over restarts, and nothing where nothing tells."""

import time
from typing import Any

import pytest
import torch

from train.config import ModelConfig
from train.data.loader import Stats
from train.telemetry.meter import Meter
from train.telemetry.power import GpuPower, open_meters

MODEL = ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=32)
CPU = torch.device("cpu")


class NVML:
    """pynvml as far as it is used, for two cards of which each has used `millijoules` and draws `milliwatts`."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts: bool = True, cards: tuple[str, ...] = ("GPU-a", "GPU-b")) -> None:
        self.counts, self.cards = counts, cards
        self.millijoules, self.milliwatts = 5_000_000, 150_000
        self.lost = False
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.cards:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.lost or not self.counts:
            raise self.NVMLError("Not Supported")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return self.milliwatts


def power_of(nvml: NVML, *uuids: str) -> GpuPower:
    found = open_meters(uuids or ("GPU-a",), nvml)
    assert found
    return found


def meter(power: GpuPower | None, price: float = 0.0) -> Meter:
    found = Meter(MODEL, 512, CPU, torch.float32, power, price)
    found.begin(0, 0, Stats(0.0, 0.0, 0, 0))
    return found


def read(of: Meter, step: int = 1) -> dict[str, Any]:
    return of.read(step, step * 256, Stats(0.0, 0.0, 0, 0))


def test_energy_is_what_the_cards_counted() -> None:
    nvml = NVML()
    power = power_of(nvml, "GPU-a", "GPU-b")
    assert power.joules() == 0
    nvml.millijoules += 7_000
    assert power.joules() == 14
    power.close()
    assert nvml.open == 0


def test_a_card_that_shows_watts_is_watched() -> None:
    nvml = NVML(counts=False)
    began = time.perf_counter()
    power = power_of(nvml)
    time.sleep(0.1)
    found = power.joules()
    assert found is not None and 150 * 0.1 <= found <= 150 * (time.perf_counter() - began)
    power.close()
    assert nvml.open == 0


def test_a_meter_that_is_lost_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    nvml = NVML()
    of = meter(power_of(nvml))
    nvml.lost = True
    for step in (1, 2):
        assert not {"watts", "energy_kwh", "cost"} & set(read(of, step))
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU's power can no longer be read: Not Supported"
    ]


def test_no_card_of_that_name() -> None:
    nvml = NVML()
    assert open_meters(["GPU-c"], nvml) is None
    assert nvml.open == 0


def test_a_row_with_energy_and_cost_over_a_restart() -> None:
    nvml = NVML()
    of = meter(power_of(nvml), price=0.5)
    of.add_earlier(3600.0, 2.0)
    nvml.millijoules += 3_600_000_000
    row = read(of)
    assert (row["energy_kwh"], row["cost"]) == (3.0, 1.5)
    assert row["watts"] > 1000
    assert of.kwh == 3 and of.seconds > 3600
    end = of.summary(tokens=3_600_000)
    assert (end["hours"], end["energy_kwh"], end["cost"]) == (pytest.approx(1.0, abs=0.01), 3.0, 1.5)
    assert end["tok_per_s"] == pytest.approx(1000, rel=0.01)
    with of:
        pass
    assert nvml.open == 0


def test_without_a_price_there_is_no_cost_and_without_a_card_no_energy() -> None:
    assert "cost" not in read(meter(power_of(NVML())))
    row = read(meter(None, price=0.5))
    assert not {"watts", "energy_kwh", "cost"} & row.keys()
    assert 0.05 < row["memory_gb"] < 100


def test_mfu_is_speed_times_cost_over_peak() -> None:
    of = meter(None)
    time.sleep(0.05)
    row = read(of)
    expected = 100 * row["tok_per_s"] * of.flops_per_token / of.peak.flops
    assert row["mfu_percent"] == pytest.approx(expected, abs=0.01) and expected > 0.01


def test_what_is_paused_is_in_no_rate() -> None:
    of = meter(None)
    with of.paused():
        time.sleep(0.3)
    assert read(of)["step_ms"] < 300
