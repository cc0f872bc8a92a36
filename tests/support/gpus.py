"""Machines with NVIDIA GPUs, as NVML and torch.cuda would describe them, for tests on a machine without any."""

import sys
from typing import Any, NamedTuple

import pynvml
import pytest
import torch

from train.machine.gpus import Gpu

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", "GPU-3090", (8, 6), 24_000_000_000, 25_769_803_776)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "GPU-4090", (8, 9), 24_000_000_000, 25_769_803_776)
T4 = Gpu("Tesla T4", "GPU-t4", (7, 5), 15_000_000_000, 16_106_127_360)
V100 = Gpu("Tesla V100-SXM2-16GB", "GPU-v100", (7, 0), 16_000_000_000, 17_179_869_184)
P100 = Gpu("Tesla P100-PCIE-16GB", "GPU-p100", (6, 0), 16_000_000_000, 17_179_869_184)
CU130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"  # of the official build


class Machine(NamedTuple):
    """What is in it: the GPUs, the driver (None: no driver) and the newest CUDA that it supports, the build of torch.

    `error` is torch's where it can use no GPU for a reason of its own, `broken` NVML's where the driver fails.
    """

    gpus: tuple[Gpu, ...] = (RTX_3090,)
    driver: str | None = "580.95.05"
    driver_cuda: int = 13000
    torch: str = "2.13.0+cu130"
    torch_cuda: str | None = "13.0"
    visible: str | None = None
    error: str = ""
    broken: int = 0

    @property
    def seen(self) -> tuple[Gpu, ...]:
        """The GPUs that torch can use."""
        if self.error or self.torch_cuda is None:
            return ()
        if self.visible is None:
            return self.gpus
        chosen = (int(entry) for entry in self.visible.split(",") if entry)
        return tuple(self.gpus[index] for index in chosen if 0 <= index < len(self.gpus))

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let NVML and torch.cuda of this process tell of this machine."""
        monkeypatch.setitem(sys.modules, "pynvml", _NVML(self))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if self.visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", self.visible)
        monkeypatch.setattr(torch, "__version__", self.torch)
        monkeypatch.setattr(torch.version, "cuda", self.torch_cuda)
        for name in ("init", "device_count", "get_device_properties", "current_device", "get_arch_list"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))

    def _init(self) -> None:
        if self.torch_cuda is None:
            raise AssertionError("Torch not compiled with CUDA enabled")
        if not self.seen:
            raise RuntimeError(self.error or "No CUDA GPUs are available")

    def _device_count(self) -> int:
        return len(self.seen)

    def _current_device(self) -> int:
        return 0

    def _get_device_properties(self, index: int) -> Any:
        gpu = self.seen[index]
        return _Properties(gpu.name, *gpu.capability, gpu.uuid.removeprefix("GPU-"))

    def _get_arch_list(self) -> list[str]:
        return CU130.split() if self.torch_cuda else []


class _Properties(NamedTuple):
    name: str
    major: int
    minor: int
    uuid: str


class _NVML:
    """pynvml as far as it is used."""

    NVMLError = pynvml.NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_DRIVER_NOT_LOADED = pynvml.NVML_ERROR_DRIVER_NOT_LOADED

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def nvmlInit(self) -> None:
        if self.machine.driver is None or self.machine.broken:
            raise pynvml.NVMLError(self.machine.broken or pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str | None:
        return self.machine.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.machine.driver_cuda

    def nvmlDeviceGetCount(self) -> int:
        return len(self.machine.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.machine.gpus[index]

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Gpu:
        if not gpu.total:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu


class Unusable(NamedTuple):
    """A machine whose GPU torch cannot use, and what is said of it: three parts, as of every error."""

    machine: Machine
    what: str
    why: str
    fix: str


CPU = "use the CPU: --set train.device=cpu (evaluate, sample: --device cpu)"
CU126 = "torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"
UNUSABLE = {
    "old driver": Unusable(
        Machine(driver="550.54.15", driver_cuda=12040, error="The NVIDIA driver on your system is too old"),
        "driver 550.54.15 is too old for torch 2.13.0+cu130: it supports CUDA 12.4, torch is built for CUDA 13.0",
        "CUDA 13 needs driver 580.65.06 or newer; until then torch cannot use NVIDIA GeForce RTX 3090",
        f"update the driver, or .venv/bin/pip install {CU126}\nor {CPU}",
    ),
    "CPU build": Unusable(
        Machine(torch="2.13.0+cpu", torch_cuda=None),
        "torch 2.13.0+cpu is built without CUDA; this machine has NVIDIA GeForce RTX 3090",
        "such a build trains on the CPU only, many times slower",
        f".venv/bin/pip install {CU126.replace('cu126', 'cu130')}\nor {CPU}",
    ),
    "all hidden": Unusable(
        Machine(visible=""),
        "CUDA_VISIBLE_DEVICES is '', which hides every GPU; this machine has NVIDIA GeForce RTX 3090",
        "it lists the GPUs that programs may use, by number; the only one is 0",
        f"unset CUDA_VISIBLE_DEVICES, or {CPU}",
    ),
    "none of two": Unusable(
        Machine((RTX_3090, RTX_4090), visible="2"),
        "CUDA_VISIBLE_DEVICES is '2', which hides every GPU; "
        "this machine has NVIDIA GeForce RTX 3090, NVIDIA GeForce RTX 4090",
        "it lists the GPUs that programs may use, by number from 0 to 1",
        f"unset CUDA_VISIBLE_DEVICES, or {CPU}",
    ),
    "sm_70": Unusable(
        Machine((V100,)),
        "Tesla V100-SXM2-16GB has compute capability 7.0, and torch 2.13.0+cu130 has no kernels for it",
        f"it has them for {CU130.replace(' ', ', ')}; training would fail in the first step",
        f".venv/bin/pip install {CU126}\nor {CPU}",
    ),
    "unknown": Unusable(
        Machine(error="Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
        "torch 2.13.0+cu130 cannot use NVIDIA GeForce RTX 3090: Unexpected error from cudaGetDeviceCount(). "
        "Error 802: system not yet initialized",
        "the driver, 580.95.05, is new enough, and the reason is torch's own",
        f"see what nvidia-smi says, or {CPU}",
    ),
    "broken driver": Unusable(
        Machine(broken=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, error="No CUDA GPUs are available"),
        f"NVIDIA's driver does not work: {pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}",
        "no program can use the GPU; after an update of the driver that is so until the next reboot",
        f"reboot and see what nvidia-smi says, or {CPU}",
    ),
}
