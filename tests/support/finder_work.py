"""What the finder's child is asked to do in tests. In a module of its own, which a spawned process can import."""

import importlib
import os
import signal
import time
from typing import Any

import torch

from train import trial
from train.micro_batch import Failed, Fit, Tell, measure


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


def leaves_a_child(tell: Tell) -> Fit | Failed:
    """What it has started holds the pipe open when it dies."""
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(20)
    os._exit(0)


def answers_nonsense(tell: Tell) -> Fit | Failed:
    return Fit(micro_batch=4, eval_batch=4, rates={4: float("nan")})


def prints(tell: Tell) -> Fit | Failed:
    print("a word of a library")
    os.write(1, b"and of its C code\n")
    return Fit(micro_batch=4, eval_batch=4)


def hangs(tell: Tell) -> Fit | Failed:
    time.sleep(600)
    raise AssertionError
