"""What the finder's child is asked to do in tests. In a module of its own, which a spawned process can import."""

import importlib
import os
import signal
import time
from typing import Any

import torch

from train import trial
from train.fitting import Failed, Fit, Tell, measure


def measure_briefly(tell: Tell, *arguments: Any) -> Fit | Failed:
    trial.TIMED_SECONDS = 0.02
    return measure(tell, *arguments)


def raises(tell: Tell) -> Fit | Failed:
    raise ValueError("Expected a torch.device with a specified index")


def out_of_memory(tell: Tell) -> Fit | Failed:
    raise torch.OutOfMemoryError("CUDA out of memory")


def imports(tell: Tell) -> Fit | Failed:
    importlib.import_module("no_such_module")
    raise AssertionError


def segfaults(tell: Tell) -> Fit | Failed:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs(tell: Tell) -> Fit | Failed:
    time.sleep(600)
    raise AssertionError
