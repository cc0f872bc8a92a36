"""What `millpond doctor` says of the GPUs: the same reasons as training would be refused with, or how it would go."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gpus import RTX_3090, RTX_4090, T4, UNUSABLE, V100, Machine

from pipeline import doctor
from pipeline.cli.main import main
from train.machine.gpus import Gpu, ask_torch


def lines(home: Path, code: int = 0) -> list[str]:
    """What doctor prints of GPUs, the advice below included."""
    found = CliRunner().invoke(main, ["doctor", "--home", str(home)])
    assert found.exit_code == code, found.output
    printed = found.stdout.splitlines()
    first = next(number for number, line in enumerate(printed) if line[9:].startswith(("cuda ", "gpu ")))
    return printed[first:]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "type[Machine]":
    """`Machine`; torch is asked in this process, which stands in for one, and compiling is possible."""
    monkeypatch.setattr(doctor, "ask_torch_apart", ask_torch)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "gcc" else None)
    return Machine


def test_one_gpu(machine: type[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine().stand_in(monkeypatch)
    found = lines(tmp_path)
    assert found == [
        "ok       cuda      torch 2.13.0+cu130 for CUDA 13.0, driver 580.95.05 for CUDA up to 13.0",
        "ok       gpu       cuda:0, NVIDIA GeForce RTX 3090, 24.0 of 25.8 GB free, capability 8.6",
        "                   trains with bf16, torch.compile, flash attention",
    ]


def test_each_of_several_gpus(machine: type[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one that a run would use decides whether the machine is fit."""
    shared = Gpu("NVIDIA GB10", "GPU-gb10", (12, 1))
    machine((T4, V100, shared)).stand_in(monkeypatch)
    found = lines(tmp_path)
    assert found[1:3] == [
        "ok       gpu       cuda:0, Tesla T4, 15.0 of 16.1 GB free, capability 7.5",
        "                   trains with fp16, torch.compile, no flash attention",
    ]
    assert found[3].startswith("warning  gpu       Tesla V100-SXM2-16GB has compute capability 7.0, and torch")
    assert found[-2] == "ok       gpu       cuda:2, NVIDIA GB10, capability 12.1"


def test_one_of_two_is_hidden(machine: type[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine((RTX_3090, RTX_4090), visible="1").stand_in(monkeypatch)
    found = lines(tmp_path)
    assert found[1] == "ok       gpu       cuda:0, NVIDIA GeForce RTX 4090, 24.0 of 25.8 GB free, capability 8.9"
    assert found[-1] == "ok       gpu       NVIDIA GeForce RTX 3090, hidden by CUDA_VISIBLE_DEVICES=1"


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_gpu_that_torch_cannot_use(
    name: str, machine: type[Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unusable = UNUSABLE[name]
    unusable.machine.stand_in(monkeypatch)
    found = lines(tmp_path, code=3)
    start = found.index(f"bad      gpu       {unusable.what}")
    assert found[start + 1 :] == [f"{'':<18} {line}" for line in (unusable.why, *unusable.fix.splitlines())]
    as_json = CliRunner().invoke(main, ["doctor", "--json", "--home", str(tmp_path)])
    assert as_json.exit_code == 3 and json.loads(as_json.stdout)["fit"] is False


@pytest.mark.parametrize(("machine", "says"), [(Machine(driver=None), "no NVIDIA driver"), (Machine(()), "no GPU")])
def test_no_gpu(machine: Machine, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody needs to ask torch then."""
    monkeypatch.setattr(sys, "executable", "/nowhere")
    machine.stand_in(monkeypatch)
    first, advice = lines(tmp_path)
    assert first.startswith("warning  gpu ") and says in first
    assert advice.strip() == "the demo runs on the CPU; GPT-2-class models need a GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what torch does without a GPU")
def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Machine().stand_in(monkeypatch)
    found = lines(tmp_path, code=3)[0]
    assert found.startswith(f"bad      gpu       torch {metadata.version('torch')} ")
    assert RTX_3090.name in found


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'ImportError: no libc10' >&2; exit 1", "ImportError: no libc10"),
        ("kill -SEGV $$", "died with <Signals.SIGSEGV: 11>."),
        ("echo nonsense", "JSON is malformed"),
        ("exec sleep 60", "timed out after 0.5 seconds"),
    ],
)
def test_a_torch_that_does_not_answer(script: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Machine().stand_in(monkeypatch)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    if "sleep" in script:
        monkeypatch.setattr(doctor, "TORCH_SECONDS", 0.5)
    first, advice = lines(tmp_path, code=3)
    assert first.startswith("bad      gpu       torch does not say what it can use: ") and says in first
    assert "--force-reinstall" in advice


@pytest.mark.parametrize(
    ("gpu", "triton", "compiler", "says"),
    [
        (RTX_3090, True, "gcc", "torch.compile"),
        (RTX_3090, True, "clang", "torch.compile"),
        (RTX_3090, True, "", "no torch.compile (it needs a C compiler: apt install gcc)"),
        (RTX_3090, False, "gcc", "no torch.compile (Triton is not installed)"),
        (Gpu("Tesla P100", "GPU-p100", (6, 0)), True, "gcc", "no torch.compile (it needs capability 7.0)"),
    ],
)
def test_whether_it_compiles(
    gpu: Gpu,
    triton: bool,
    compiler: str,
    says: str,
    machine: type[Machine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    machine((gpu,)).stand_in(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", "sm_86"])
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "triton" and not triton else name)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.delenv("CC", raising=False)
    assert lines(tmp_path)[-1].split(", ", 1)[1].rpartition(", ")[0] == says
