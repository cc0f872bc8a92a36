"""Which NVIDIA GPUs this machine has, as its driver and as torch know them, and why torch cannot use one.

A GPU that the driver shows and torch does not is a mistake that can be fixed: training on the CPU instead would only
hide it. torch is loaded by `ask_torch` alone, so that whoever reads the driver need not load it.
"""

import re
from contextlib import suppress
from typing import Any, NamedTuple

from shards.errors import HostError

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # on Linux, by the major version of CUDA
ON_THE_CPU = "use the CPU: --set train.device=cpu (evaluate, sample: --device cpu)"


class Gpu(NamedTuple):
    """A GPU, its compute capability, and its memory in bytes, 0 where that is not known."""

    name: str
    uuid: str
    capability: tuple[int, int]
    free: int = 0
    total: int = 0


class Driver(NamedTuple):
    """NVIDIA's driver: the newest CUDA it supports, the GPUs it shows; `broken` is its error where it has only that."""

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    gpus: tuple[Gpu, ...] = ()
    broken: str = ""


class Build(NamedTuple):
    """The installed torch: the CUDA it is built for and the GPU architectures it has kernels for; the GPUs it can use.

    `cuda` is None for a build without CUDA; `error` is torch's own where there is no GPU.
    """

    version: str
    cuda: str | None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


class _Wheel(NamedTuple):
    """One of the builds of torch that pytorch.org offers: the driver and the GPUs it is for."""

    tag: str
    cuda: int
    oldest: tuple[int, int]
    newest: tuple[int, int]


WHEELS = (_Wheel("cu130", 13, (7, 5), (12, 9)), _Wheel("cu126", 12, (5, 0), (9, 9)))  # of torch 2.12 to 2.14


def read_driver() -> Driver | None:
    """What NVIDIA's driver says, in a few ms; None without a driver."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        try:
            cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
            gpus = [_shown(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            version = nvml.nvmlSystemGetDriverVersion()
            return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(gpus))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        absent = error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return None if absent else Driver(broken=str(error))


def ask_torch() -> Build:
    """What torch says. It loads torch, and CUDA where there is a GPU."""
    import warnings

    import torch

    gpus: list[Gpu] = []
    error = ""
    with warnings.catch_warnings():  # torch warns of old drivers and old GPUs: they are refused in our own words
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            for index in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(index)
                gpus.append(Gpu(found.name, f"GPU-{found.uuid}", (found.major, found.minor)))
        except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as failed:
            error = " ".join(str(failed).split())
    return Build(str(torch.__version__), torch.version.cuda, tuple(torch.cuda.get_arch_list()), tuple(gpus), error)


def why_none(driver: Driver | None, build: Build, visible: str | None) -> HostError | None:
    """Why torch can use no GPU of this driver's; None where it can, or where there is no GPU.

    `visible` is the value of CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    if build.gpus or driver is None or not (driver.gpus or driver.broken):
        return None
    if driver.broken:
        return HostError(
            f"NVIDIA's driver does not work: {driver.broken}",
            "no program can use the GPU; after an update of the driver that is so until the next reboot",
            f"reboot and see what nvidia-smi says, or {ON_THE_CPU}",
        )
    gpu = driver.gpus[0]
    if visible is not None and _hides_all(visible, driver):
        last = len(driver.gpus) - 1
        return HostError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU; this machine has {_listed(driver)}",
            "it lists the GPUs that programs may use, by number"
            + (f" from 0 to {last}" if last else "; the only one is 0"),
            f"unset CUDA_VISIBLE_DEVICES, or {ON_THE_CPU}",
        )
    if build.cuda is None:
        return HostError(
            f"torch {build.version} is built without CUDA; this machine has {_listed(driver)}",
            "such a build trains on the CPU only, many times slower",
            _other_build(build, gpu, driver),
        )
    major = int(build.cuda.partition(".")[0])
    if driver.cuda[0] < major:
        needed = f"driver {LEAST_DRIVER[major]} or newer" if major in LEAST_DRIVER else "a newer driver"
        return HostError(
            f"driver {driver.version} is too old for torch {build.version}: it supports CUDA {_dotted(driver.cuda)}, "
            f"torch is built for CUDA {build.cuda}",
            f"CUDA {major} needs {needed}; until then torch cannot use {_listed(driver)}",
            f"update the driver, or {_other_build(build, gpu, driver)}",
        )
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return HostError(
        f"torch {build.version} cannot use {_listed(driver)}: {build.error}{hidden}",
        f"the driver, {driver.version}, is new enough, and the reason is torch's own",
        f"see what nvidia-smi says, or {ON_THE_CPU}",
    )


def why_not(gpu: Gpu, build: Build, driver: Driver | None) -> HostError | None:
    """Why `gpu`, which torch sees, cannot run torch's kernels; None where it can."""
    compiled = [
        (kind, (int(major), int(minor)))
        for kind, major, minor in re.findall(r"\b(sm|compute)_(\d+)(\d)[af]?\b", " ".join(build.architectures))
    ]
    if not compiled or any(_runs(gpu.capability, kind, built) for kind, built in compiled):
        return None
    return HostError(
        f"{gpu.name} has compute capability {_dotted(gpu.capability)}, and torch {build.version} has no kernels for it",
        f"it has them for {', '.join(build.architectures)}; training would fail in the first step",
        _other_build(build, gpu, driver),
    )


def _shown(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    free = total = 0
    with suppress(nvml.NVMLError):  # a GPU that shares the memory of the CPU does not say
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        free, total = memory.free, memory.total
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle), (major, minor), free, total)


def _runs(capability: tuple[int, int], kind: str, built: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor on, PTX on whatever is as new or newer."""
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _hides_all(visible: str, driver: Driver) -> bool:
    """CUDA reads the list up to the first entry that is no GPU, so the first decides whether any is left."""
    first = visible.split(",")[0].strip()
    if first.startswith("GPU-"):
        return not any(gpu.uuid.startswith(first) for gpu in driver.gpus)
    return not first.startswith("MIG-") and not (first.isdecimal() and int(first) < len(driver.gpus))


def _other_build(build: Build, gpu: Gpu, driver: Driver | None) -> str:
    """The command that installs a build of the same torch for this driver and GPU, where there is one."""
    newest = driver.cuda[0] if driver else WHEELS[0].cuda
    for wheel in WHEELS:
        if wheel.cuda <= newest and wheel.oldest <= gpu.capability <= wheel.newest:
            torch = f"torch=={build.version.partition('+')[0]}+{wheel.tag}"
            index = f"https://download.pytorch.org/whl/{wheel.tag}"
            return f".venv/bin/pip install {torch} --index-url {index}\nor {ON_THE_CPU}"
    return ON_THE_CPU


def _listed(driver: Driver) -> str:
    return ", ".join(gpu.name for gpu in driver.gpus)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
