"""The power and energy of NVIDIA GPUs, as their own meters report them: GPU energy only, not the whole machine's."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)
SECONDS = 1.0  # between two reads of a GPU that reports watts and does not count energy


def gpu_power(devices: Sequence[torch.device]) -> "GpuPower | None":
    """The meters of the devices; None without NVIDIA's driver, on another kind of device, or where they show nothing.

    GPUs are found by their UUID: CUDA_VISIBLE_DEVICES gives them other numbers than the driver does.
    """
    if not devices or any(device.type != "cuda" for device in devices):
        return None
    import pynvml

    return open_meters([f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices], pynvml)


def open_meters(uuids: Sequence[str], nvml: Any) -> "GpuPower | None":
    """`gpu_power` of the GPUs with these UUIDs; `nvml` is the module pynvml."""
    try:
        nvml.nvmlInit()
        try:
            return GpuPower(nvml, [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids])
        except nvml.NVMLError:
            nvml.nvmlShutdown()
            raise
    except nvml.NVMLError as error:
        logger.info("the GPU's power cannot be read: %s", error)
        return None


class GpuPower:
    """Joules since it was made, of all GPUs together.

    Where the GPUs count their energy (Volta and later), the counts' difference; else their watts, read every
    second and summed up.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles, self._failed = nvml, handles, False
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._first = self._counted()
        except nvml.NVMLError:
            self._sum, self._seen, self._watts = 0.0, time.perf_counter(), self._shown()
            self._thread = threading.Thread(target=self._watch, name="power", daemon=True)
            self._thread.start()

    def joules(self) -> float | None:
        """What was used so far; None from the first failure on: a sum with a gap is no sum."""
        if not self._failed:
            try:
                return self._summed() if self._thread else self._counted() - self._first
            except self._nvml.NVMLError as error:
                self._failed = True
                logger.warning("the GPU's power can no longer be read: %s", error)
        return None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self._thread:
            self._thread.join()
        self._nvml.nvmlShutdown()

    def _counted(self) -> float:
        millijoules: int = sum(map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handles))
        return millijoules / 1000

    def _shown(self) -> float:
        milliwatts: int = sum(map(self._nvml.nvmlDeviceGetPowerUsage, self._handles))
        return milliwatts / 1000

    def _summed(self) -> float:
        with self._lock:
            watts, now = self._shown(), time.perf_counter()
            self._sum += (now - self._seen) * (watts + self._watts) / 2
            self._watts, self._seen = watts, now
            return self._sum

    def _watch(self) -> None:
        while not self._closed.wait(SECONDS) and self.joules() is not None:
            pass
