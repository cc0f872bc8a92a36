"""The device that a run gets: the machine's GPU, or the CPU where there is none or it is asked for."""

import pytest
import torch
from gpus import P100, RTX_3090, RTX_4090, T4, UNUSABLE, V100, Machine
from harness import complains

from shards import HostError
from train.machine.device import devices_here, pick_device
from train.machine.gpus import Gpu


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((RTX_3090, RTX_4090)).stand_in(monkeypatch)
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((RTX_3090, RTX_4090)).stand_in(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with complains(
        HostError,
        "4 processes on this machine, which has 2 CUDA GPUs",
        "each process trains on a GPU of its own",
        "hint: torchrun --nproc-per-node 2 …",
    ):
        pick_device()


def test_the_devices_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has one, whatever its number; torchrun's processes have one each."""
    assert devices_here(torch.device("cuda", 1)) == [torch.device("cuda", 1)]
    assert devices_here(torch.device("cpu")) == [torch.device("cpu")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert devices_here(torch.device("cuda", 1)) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices_here(torch.device("cpu")) == [torch.device("cpu")]


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_gpu_that_torch_cannot_use_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, what, why, fix = UNUSABLE[name]
    machine.stand_in(monkeypatch)
    for wanted in ("auto", "cuda"):
        with pytest.raises(HostError) as refused:
            pick_device(wanted)  # type: ignore[arg-type]
        assert refused.value.args == (what, why, fix)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("machine", [Machine(driver=None), Machine(gpus=()), Machine(driver=None, torch_cuda=None)])
def test_without_a_gpu_there_is_the_cpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine._replace(error="Found no NVIDIA driver on your system").stand_in(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with complains(HostError, "train.device", "NVIDIA", "GPU"):
        pick_device("cuda")


def test_one_of_two_gpus_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((V100, RTX_3090), visible="1").stand_in(monkeypatch)
    assert pick_device() == torch.device("cuda", 0)


@pytest.mark.parametrize("gpu", [T4, RTX_3090, RTX_4090, Gpu("NVIDIA B300", "GPU-b300", (10, 3))])
def test_code_runs_on_later_gpus_of_its_generation(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((gpu,)).stand_in(monkeypatch)
    assert pick_device().type == "cuda"


@pytest.mark.parametrize("gpu", [P100, V100, Gpu("a later one", "GPU-later", (11, 0))])
def test_a_gpu_that_the_build_has_no_code_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((gpu,)).stand_in(monkeypatch)
    with complains(HostError, f"{gpu.name}"):
        pick_device()
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "compute_50"])
    assert pick_device().type == "cuda"  # PTX is compiled on the spot, for whatever is as new
