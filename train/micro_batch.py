"""Find the micro-batch that is fastest on this GPU, by timing real steps in a child process; the answer is cached.

A process that has run out of memory is not the same as before, so the one that tries is thrown away. Whatever goes
wrong in it, the run trains with an estimate.
"""

import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec
import torch

from shards.atomic import make_folder, publish_bytes
from shards.errors import MillpondError
from train.config import ModelConfig, OptimConfig, Size, TrainConfig
from train.machine.compile import wants_compile
from train.machine.device import device_name, memory_used, resolve_precision
from train.machine.memory import HEADROOM, cap_memory, cuda_memory
from train.model.gpt import Model
from train.schedule import Ramp
from train.trial import Trial

logger = logging.getLogger(__name__)
NEAR_BEST = 0.98  # a rate this near the best is as good, and the smaller batch that has it leaves room
MOST_EVALUATED = 256  # sequences: no GPU is faster with more
PATIENCE = 600.0  # seconds without a message from the child, which compiles for a minute or two at a time
STEP_VERSION = 2  # of the code that is timed: what was measured with another one is measured again


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides what is best. `sequences` are those of a step, which the micro-batch divides.

    `free_eighths` is how much of the GPU's memory other processes leave.
    """

    gpu: str
    memory: int
    free_eighths: int
    torch: str
    model: ModelConfig
    optimizer: str
    vocab_size: int
    precision: str
    compile: bool
    checkpoint_activations: bool
    sequences: int
    document_mask: bool = False
    step_version: int = STEP_VERSION


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fit"):
    """Sequences at once, in training and in evaluation, and the tokens a second that each size tried gave."""

    micro_batch: Size
    eval_batch: Size
    rates: dict[int, float] = {}
    eval_rates: dict[int, float] = {}


class Tried(msgspec.Struct, frozen=True, tag="tried"):
    """One size that was timed: tokens a second and the most memory in bytes; None where it did not fit."""

    what: str
    size: int
    tok_per_s: float | None
    memory: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why there is no answer."""

    reason: str


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    case: Case
    fit: Fit


Tell = Callable[[Tried], None]


def best_fit(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    vocab_size: int,
    device: torch.device,
    cache: Path | None,
) -> Fit:
    """The micro-batch asked for, or measured on CUDA and estimated elsewhere; the smallest within 2 % of the best rate.

    What was measured is kept in the JSON file `cache`. Call it before anything else is in the GPU's memory.
    """
    sequences = Ramp(model, train).sequences
    precision = resolve_precision(train, device)
    with torch.device("meta"):
        parameters = Model(model, vocab_size).parameter_count()
    guess = estimated_micro_batch(sequences, parameters, model, vocab_size, device, precision)
    if train.micro_batch or device.type != "cuda":
        return Fit(micro_batch=train.micro_batch or guess, eval_batch=guess)
    free, total = cuda_memory(device)
    case = Case(
        gpu=device_name(device),
        memory=total,
        free_eighths=round(8 * free / total),
        torch=str(torch.__version__),  # a subclass of str, which msgspec does not encode
        model=model,
        optimizer=optim.name,
        vocab_size=vocab_size,
        precision=str(precision).removeprefix("torch."),
        compile=wants_compile(train, device),
        checkpoint_activations=train.checkpoint_activations,
        sequences=sequences,
        document_mask=train.document_mask,
    )
    known = _read(cache)
    for each in known:
        if each.case == case and sequences % each.fit.micro_batch == 0:
            return each.fit
    logger.info("finding the micro-batch for this GPU and model: a few minutes, once")
    found = in_child(measure, model, optim, train, vocab_size, str(device), max(1, guess // 4))
    if isinstance(found, Failed):
        logger.warning(
            "the micro-batch could not be measured: %s\n"
            "estimated instead: %d sequences; to choose it: --set train.micro_batch=N",
            found.reason,
            guess,
        )
        return Fit(micro_batch=guess, eval_batch=guess)
    if cache is not None:
        try:
            make_folder(cache.parent)
            publish_bytes(cache, msgspec.json.format(msgspec.json.encode([*known, _Known(case, found)])) + b"\n")
        except MillpondError as error:
            logger.warning("the micro-batch will be measured again next time: %s", error)
    return found


def in_child(work: Callable[..., Fit | Failed], *arguments: Any, patience: float = PATIENCE) -> Fit | Failed:
    """`work(tell, *arguments)` in a process of its own; what it tells is logged.

    Failed with the reason when it raises, dies, or has not told anything for `patience` seconds.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, work, arguments), name="finder", daemon=True)
    try:
        child.start()
        theirs.close()
        while wait([ours, child.sentinel], patience):
            if not ours.poll():
                raise EOFError  # it has died, and a process that it had started holds the other end
            message: Tried | Fit | Failed = msgspec.json.decode(ours.recv_bytes(), type=Tried | Fit | Failed)
            if not isinstance(message, Tried):
                return message
            _report(message)
        return Failed(f"no answer for {patience:.0f} s")
    except EOFError:
        child.join(10)
        return Failed(f"the process that measures ended with exit code {child.exitcode}")
    except msgspec.MsgspecError as error:
        return Failed(f"the process that measures gave no valid answer: {error}")
    except OSError as error:
        return Failed(f"no process could be started: {error}")
    finally:
        if child.pid is not None:
            child.kill()
            child.join()
        ours.close()


def measure(
    tell: Tell, model: ModelConfig, optim: OptimConfig, train: TrainConfig, vocab_size: int, device_: str, start: int
) -> Fit | Failed:
    """Real steps on random tokens, about `start` sequences at once and upwards."""
    device = torch.device(device_)
    if device.type == "cuda":
        cap_memory(device)
    trial = Trial(model, optim, train, vocab_size, device)
    sequences = Ramp(model, train).sequences

    def told(what: str, rate: Callable[[int], float | None]) -> Callable[[int], float | None]:
        def tried(size: int) -> float | None:
            found = rate(size)
            tell(Tried(what, size, found, memory_used(device)))
            return found

        return tried

    sizes = _doubling([size for size in range(1, sequences + 1) if sequences % size == 0])
    rates = search(sizes, start, told("training", trial.training_rate))
    if not rates:
        return Failed("out of memory with one sequence at once")
    micro_batch = choose(rates)
    eval_sizes = [size for size in (2**i for i in range(20)) if size <= max(micro_batch, MOST_EVALUATED)]
    eval_rates = search(eval_sizes, micro_batch, told("evaluation", trial.evaluation_rate))
    eval_batch = choose(eval_rates) if eval_rates else 1
    return Fit(micro_batch=micro_batch, eval_batch=eval_batch, rates=rates, eval_rates=eval_rates)


def search(sizes: list[int], start: int, rate: Callable[[int], float | None]) -> dict[int, float]:
    """The rate of each size tried: upwards from the last that is at most `start`, until it falls or does not fit.

    `rate` says None where the memory runs out; when it does at once, smaller sizes are tried. The first size meets a
    GPU whose clock is not up yet, so it is timed once more.
    """
    first = max(i for i, size in enumerate(sizes) if i == 0 or size <= start)
    rates: dict[int, float] = {}
    for size in sizes[first:]:
        found = rate(size)
        if found is None:
            break
        rates[size] = found
        if found < NEAR_BEST * max(rates.values()):
            break
    for size in reversed(sizes[:first]):
        if rates:
            break
        if (found := rate(size)) is not None:
            rates[size] = found
    if len(rates) > 1:
        again = next(iter(rates))
        rates[again] = max(rates[again], rate(again) or 0.0)
    return rates


def choose(rates: dict[int, float]) -> int:
    """The smallest size within 2 % of the best rate."""
    return min(size for size, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))


def estimated_micro_batch(
    sequences: int, parameters: int, model: ModelConfig, vocab_size: int, device: torch.device, precision: torch.dtype
) -> int:
    """The most sequences at once that divide `sequences` and should fit: 8 % of the memory is left alone.

    Bytes a token, in bf16: 43 for each layer and unit of width, and fp32 twice that. Weights, gradients and optimizer:
    16 bytes a parameter; the loss: 1.4 GB at GPT-2's vocabulary.
    """
    memory = cuda_memory(device)[0] if device.type == "cuda" else 4 << 30
    width = 2 if precision is torch.float32 else 1
    a_token = width * 43 * model.n_layer * model.d_model
    room = int((memory * (1 - HEADROOM) - 16 * parameters - 28_000 * vocab_size) / (a_token * model.seq_len))
    small = [size for size in range(1, math.isqrt(sequences) + 1) if sequences % size == 0]
    return max(size for size in (*small, *(sequences // size for size in small)) if size <= max(1, room))


def _answer(connection: Connection, work: Callable[..., Fit | Failed], arguments: tuple[Any, ...]) -> None:
    """The child: send what `work` tells, then its answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    os.dup2(2, 1)  # stdout is the parent's answer, which a program may read

    def send(message: Tried | Fit | Failed) -> None:
        connection.send_bytes(msgspec.json.encode(message))

    try:
        answer = work(send, *arguments)
    except Exception as error:
        answer = Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    with suppress(OSError):  # the parent is gone
        send(answer)


def _report(tried: Tried) -> None:
    if tried.tok_per_s is None:
        logger.info("%s with %d sequences at once: out of memory", tried.what, tried.size)
        return
    rate, gigabytes = f"{tried.tok_per_s:,.0f}", tried.memory / 1e9
    logger.info("%s with %d sequences at once: %s tok/s, %.1f GB", tried.what, tried.size, rate, gigabytes)


def _doubling(sizes: list[int]) -> list[int]:
    """Of ascending `sizes`, each at least twice the one before it."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 2 * kept[-1]:
            kept.append(size)
    return kept


def _read(cache: Path | None) -> list[_Known]:
    """What is known; nothing when the file is missing or of another version: then it is measured again."""
    try:
        return [] if cache is None else msgspec.json.decode(cache.read_bytes(), type=list[_Known])
    except (OSError, ValueError, msgspec.MsgspecError):
        return []
