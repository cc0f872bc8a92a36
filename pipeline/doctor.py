"""Is this machine fit to prepare and to train? Each answer is measured here and now.

torch is not loaded for it: where there is a GPU, a process of its own asks it.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import msgspec

from pipeline.home.layout import Layout
from pipeline.home.receipt import versions
from train.machine.gpus import Build, Driver, Gpu, read_driver, why_none, why_not

OVERNIGHT_GB = 12  # 2 B tokens of shards, the parquet files they come from two at a time, checkpoints
TORCH_SECONDS = 120  # torch is read from the disk, which may be cold and far away


class Check(NamedTuple):
    """One question, its answer, and what follows from it or is to be done about it."""

    name: str
    state: Literal["ok", "warning", "bad"]
    found: str
    advice: str = ""


def examine(layout: Layout) -> list[Check]:
    """Every check, in order."""
    return [_python(), _packages(), *_memory(), _home(layout), _disk(layout), *_gpus(), *_environment()]


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The checks for a program to read."""
    return {
        "fit": all(check.state != "bad" for check in checks),
        "checks": [check._asdict() for check in checks],
        "versions": versions(),
    }


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Check:
    missing = [name for name in ("torch", "numpy", "pyarrow", "tiktoken", "tokenizers") if find_spec(name) is None]
    if missing:
        return Check("packages", "bad", f"missing: {', '.join(missing)}", "pip install -e .")
    if find_spec("fastokens") is None:
        return Check("packages", "warning", "no fastokens", "tokenizing takes about ten times as long without it")
    return Check("packages", "ok", f"torch {versions()['torch']}, fast tokenizer present")


def _memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{cores} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available < 2e9:
        return [Check("memory", "warning", found, "prepare with --set tokens.workers=1")]
    return [Check("memory", "ok", found)]


def _home(layout: Layout) -> Check:
    place = next(folder for folder in (layout.home, *layout.home.absolute().parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("home", "bad", f"{place} is not writable", "choose another with --home DIR")
    return Check("home", "ok", f"{layout.home} is writable")


def _disk(layout: Layout) -> Check:
    place = next(folder for folder in (layout.home, *layout.home.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < OVERNIGHT_GB:
        advice = f"the overnight preset needs about {OVERNIGHT_GB} GB; the demo needs 0.2"
        return Check("disk", "warning", f"{free:.1f} GB free", advice)
    return Check("disk", "ok", f"{free:.1f} GB free")


def _gpus() -> list[Check]:
    driver = read_driver()
    if driver is None or not (driver.gpus or driver.broken):
        found = "no NVIDIA driver" if driver is None else f"NVIDIA driver {driver.version}, which shows no GPU"
        return [Check("gpu", "warning", found, "the demo runs on the CPU; GPT-2-class models need a GPU")]
    try:
        build = ask_torch_apart()
    except (subprocess.SubprocessError, msgspec.DecodeError) as error:
        failed = getattr(error, "stderr", b"") or str(error).encode()
        said = (failed.decode(errors="replace").strip() or "nothing").splitlines()[-1]
        again = "install it again: .venv/bin/pip install --force-reinstall -c constraints.txt torch"
        return [Check("gpu", "bad", f"torch does not say what it can use: {said}", again)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if refusal := why_none(driver, build, visible):
        return [Check("gpu", "bad", refusal.what, f"{refusal.why}\n{refusal.fix}")]
    versions = f"torch {build.version} for CUDA {build.cuda}, driver {driver.version} for CUDA up to "
    checks = [Check("cuda", "ok", versions + ".".join(map(str, driver.cuda)))]
    checks += [_usable(index, gpu, build, driver) for index, gpu in enumerate(build.gpus)]
    used = {gpu.uuid for gpu in build.gpus}
    hidden = [gpu for gpu in driver.gpus if gpu.uuid not in used and visible is not None]
    return checks + [Check("gpu", "ok", f"{gpu.name}, hidden by CUDA_VISIBLE_DEVICES={visible}") for gpu in hidden]


def ask_torch_apart() -> Build:
    """What torch says, from a process of its own. SubprocessError or DecodeError where it does not come to that."""
    code = "import sys, msgspec, train.machine.gpus as g; sys.stdout.buffer.write(msgspec.json.encode(g.ask_torch()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True, timeout=TORCH_SECONDS)
    return msgspec.json.decode(done.stdout, type=Build)


def _usable(index: int, gpu: Gpu, build: Build, driver: Driver) -> Check:
    """A GPU that torch sees, and how it would train; a run without torchrun uses the first."""
    if refusal := why_not(gpu, build, driver):
        return Check("gpu", "warning" if index else "bad", refusal.what, f"{refusal.why}\n{refusal.fix}")
    shown = next((each for each in driver.gpus if each.uuid == gpu.uuid), gpu)
    memory = f", {shown.free / 1e9:.1f} of {shown.total / 1e9:.1f} GB free" if shown.total else ""
    found = f"cuda:{index}, {gpu.name}{memory}, capability {gpu.capability[0]}.{gpu.capability[1]}"
    ampere = gpu.capability >= (8, 0)
    ways = "bf16" if ampere else "fp16", _compiling(gpu), "flash attention" if ampere else "no flash attention"
    return Check("gpu", "ok", found, "trains with " + ", ".join(ways))


def _compiling(gpu: Gpu) -> str:
    """Whether torch.compile works, as far as can be told without compiling."""
    if gpu.capability < (7, 0):
        return "no torch.compile (it needs capability 7.0)"
    if find_spec("triton") is None:
        return "no torch.compile (Triton is not installed)"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return "no torch.compile (it needs a C compiler: apt install gcc)"
    return "torch.compile"


def _environment() -> list[Check]:
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and os.environ.get("HF_TOKEN") and "huggingface.co" not in endpoint:
        return [Check("hub", "warning", "HF_ENDPOINT is another host and HF_TOKEN is set", "the token would go there")]
    return []
