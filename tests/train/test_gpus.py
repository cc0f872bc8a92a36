"""What the driver and torch say of GPUs, and which way out is named where they disagree."""

import pytest
from gpus import RTX_3090, RTX_4090, V100, Machine

from train.machine.gpus import Build, Driver, Gpu, read_driver, why_none, why_not

HIDDEN = "which hides every GPU"


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Gpu("NVIDIA GB10", "GPU-gb10", (12, 1))  # its memory is the CPU's, and NVML does not say how much
    Machine((RTX_3090, shared), driver="550.54.15", driver_cuda=12040).stand_in(monkeypatch)
    assert read_driver() == Driver("550.54.15", (12, 4), (RTX_3090, shared))
    Machine(driver=None).stand_in(monkeypatch)
    assert read_driver() is None


@pytest.mark.parametrize(
    ("visible", "hides"),
    [
        ("", True),
        ("-1", True),
        ("2", True),
        ("2,0", True),
        ("cuda:0", True),
        ("GPU-aaaa", True),
        ("0", False),
        (" 1 ,0", False),
        ("1,7", False),
        ("GPU-409", False),
        ("MIG-1234", False),
        (None, False),
    ],
)
def test_what_hides_every_gpu(visible: str | None, hides: bool) -> None:
    driver = Driver("580.95.05", (13, 0), (RTX_3090, RTX_4090))
    refusal = why_none(driver, Build("2.13.0", "13.0", error="No CUDA GPUs are available"), visible)
    assert refusal and (HIDDEN in refusal.what) == hides
    if visible and not hides:
        assert refusal.what.endswith(f"(CUDA_VISIBLE_DEVICES is {visible!r})")


@pytest.mark.parametrize(
    ("cuda", "driver_cuda", "says"),
    [
        ("13.0", (12, 9), "CUDA 13 needs driver 580.65.06 or newer"),
        ("12.6", (11, 8), "CUDA 12 needs driver 525.60.13 or newer"),
        ("11.8", (10, 2), "CUDA 11 needs driver 450.80.02 or newer"),
        ("14.0", (13, 0), "CUDA 14 needs a newer driver"),
        ("12.8", (12, 4), "is new enough"),  # a build runs on every driver of its major version
        ("12.6", (13, 0), "is new enough"),
    ],
)
def test_which_driver_a_build_needs(cuda: str, driver_cuda: tuple[int, int], says: str) -> None:
    refusal = why_none(Driver("1", driver_cuda, (RTX_3090,)), Build("2.13.0", cuda), None)
    assert refusal and says in refusal.why


@pytest.mark.parametrize(
    ("gpu", "driver_cuda", "wheel"),
    [
        (RTX_3090, (12, 4), "cu126"),
        (RTX_3090, (13, 0), "cu130"),
        (V100, (13, 0), "cu126"),
        (RTX_3090, (11, 8), ""),  # no build of it is for such a driver
        (Gpu("NVIDIA GeForce RTX 5090", "GPU-5090", (12, 0)), (12, 8), ""),
        (Gpu("Tesla K80", "GPU-k80", (3, 7)), (11, 4), ""),
    ],
)
def test_which_build_is_named(gpu: Gpu, driver_cuda: tuple[int, int], wheel: str) -> None:
    refusal = why_none(Driver("1", driver_cuda, (gpu,)), Build("2.13.0+cpu", None), None)
    assert refusal and ("pip install" in refusal.fix) == bool(wheel)
    assert f"torch==2.13.0+{wheel} --index-url" in refusal.fix or not wheel
    assert "--set train.device=cpu" in refusal.fix


def test_an_architecture_of_another_kind_is_not_refused() -> None:
    """Whoever built torch himself knows what for: what is not understood is not refused."""
    assert why_not(RTX_3090, Build("2.13.0+rocm7.2", None, ("gfx942", "gfx1100")), None) is None
    assert why_not(RTX_3090, Build("2.13.0", "13.0"), None) is None
    assert why_not(Gpu("NVIDIA H100", "GPU-h100", (9, 0)), Build("2.13.0", "13.0", ("sm_80", "sm_90a")), None) is None
