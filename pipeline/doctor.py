"""Is this machine fit to prepare and to train? Each answer is measured here and now; torch is not loaded for it."""

import os
import platform
import shutil
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from pipeline.layout import Layout
from pipeline.receipt import versions

OVERNIGHT_GB = 12  # 2 B tokens of shards, the parquet files they come from two at a time, checkpoints


class Check(NamedTuple):
    """One question, its answer, and what to do about it."""

    name: str
    state: Literal["ok", "warning", "bad"]
    found: str
    advice: str = ""


def examine(layout: Layout) -> list[Check]:
    """Every check, in order."""
    return [_python(), _packages(), *_memory(), _home(layout), _disk(layout), _gpu(), *_environment()]


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


def _gpu() -> Check:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return Check("gpu", "warning", "no NVIDIA driver", "the demo runs on the CPU; GPT-2-class models need a GPU")
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        found = f"{pynvml.nvmlDeviceGetName(handle)}, {memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
        return Check("gpu", "ok", f"{found}, driver {pynvml.nvmlSystemGetDriverVersion()}")
    except pynvml.NVMLError as error:
        return Check("gpu", "warning", f"NVIDIA driver present, no GPU usable: {error}", "check nvidia-smi")
    finally:
        pynvml.nvmlShutdown()


def _environment() -> list[Check]:
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and os.environ.get("HF_TOKEN") and "huggingface.co" not in endpoint:
        return [Check("hub", "warning", "HF_ENDPOINT is another host and HF_TOKEN is set", "the token would go there")]
    return []
