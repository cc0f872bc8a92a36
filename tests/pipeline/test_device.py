"""The device as a person meets it: a GPU that cannot be used is refused before any work, and --set names the CPU."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gpus import UNUSABLE, Machine

from pipeline.cli.main import main
from shards import HostError
from train.machine import device


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said(result: Result, name: str) -> bool:
    """Whether it was refused with all of the three parts."""
    unusable = UNUSABLE[name]
    expected = f"error: {unusable.what}\n{unusable.why}\nhint: {unusable.fix}\n"
    return result.exit_code == 3 and result.stdout == "" and result.stderr.endswith(expected)


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_refused_before_any_work(
    verb: str, name: str, tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNUSABLE[name].machine.stand_in(monkeypatch)
    done = run(verb, tiny_toml, "--home", tmp_path)
    assert said(done, name), done.output
    assert not list(tmp_path.iterdir())


def test_cuda_is_insisted_on(tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no driver at all `auto` is the CPU: a container without its GPU would train there all night."""
    Machine(driver=None, error="Found no NVIDIA driver on your system").stand_in(monkeypatch)
    done = run("train", tiny_toml, "--home", tmp_path, "--set", "train.device=cuda")
    assert done.exit_code == 3
    assert done.stderr.startswith("error: train.device is cuda, and this machine has no NVIDIA GPU")
    assert not list(tmp_path.iterdir())


def test_each_process_asks_for_the_device_of_the_recipe(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pick(wanted: str) -> None:
        raise HostError(f"asked for {wanted}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(device, "pick_device", pick)
    done = run("train", tiny_toml, "--home", tmp_path, "--set", "train.device=cpu")
    assert (done.exit_code, done.stderr) == (3, "error: asked for cpu\n")


@pytest.mark.slow
def test_on_the_cpu_of_a_machine_with_a_gpu(tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run keeps its device; it is no part of its identity, and what is done needs none."""
    UNUSABLE["CPU build"].machine.stand_in(monkeypatch)
    options = (tiny_toml, "--home", tmp_path, "--set", "train.steps=2")
    cpu = "--set", "train.device=cpu"
    assert run("prepare", *options).exit_code == 0  # needs no GPU
    assert run("plan", *options, *cpu).exit_code == 0
    done = run("train", *options, *cpu)
    assert done.exit_code == 0, done.stderr
    again = run("train", *options)
    assert again.exit_code == 0 and "already done" in again.stderr
    assert said(run("train", *options, "--fresh"), "CPU build")
    assert (tmp_path / "runs" / "tiny" / "receipt.json").exists()
    for verb in ("evaluate", "sample"):
        assert run(verb, "tiny", "--home", tmp_path).exit_code == 0  # as the run was trained
        assert said(run(verb, "tiny", "--home", tmp_path, "--device", "auto"), "CPU build")
    toml = tmp_path / "runs" / "tiny" / "run.toml"
    toml.write_text(toml.read_text().replace('device = "cpu"', 'device = "auto"'))
    for verb in ("evaluate", "sample"):
        assert said(run(verb, "tiny", "--home", tmp_path), "CPU build")
        assert run(verb, "tiny", "--home", tmp_path, "--device", "cpu").exit_code == 0
