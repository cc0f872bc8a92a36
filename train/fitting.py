"""How many sequences at once are best on this card: found by doing it, in a process of its own, and remembered.

A process that ran out of memory is not the same as before; the one that tries is thrown away afterwards.
"""

import gc
import logging
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec
import numpy as np
import torch

from shards.atomic import make_folder, publish_bytes
from train.compile import compile_model, wants_compile
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.device import (
    autocast,
    device_name,
    fitting_micro_batch,
    loss_scaler,
    resolve_precision,
    synchronize,
)
from train.documents import ends_of
from train.loader import Batch
from train.model import Model
from train.optim import Optimizers
from train.ramp import Ramp
from train.step import Stepper

logger = logging.getLogger(__name__)
HEADROOM = 0.08  # of the free memory is left alone: what else is on the card moves, and memory fragments
NEAR_BEST = 0.98  # a rate this near the best is as good, and the smaller batch that has it leaves room
MOST_EVALUATED = 256  # sequences: no card is faster with more


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides what is best. `sequences` are those of a step, which the micro-batch divides."""

    card: str
    torch: str
    model: ModelConfig
    optimizer: str
    vocab_size: int
    precision: str
    compile: bool
    checkpoint_activations: bool
    sequences: int
    document_mask: bool = False


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sequences at once, in training and in evaluation, and the tokens a second that each size tried gave."""

    micro_batch: int
    eval_batch: int
    rates: dict[int, float] = {}
    eval_rates: dict[int, float] = {}


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    case: Case
    fit: Fit


def best_fit(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    vocab_size: int,
    device: torch.device,
    cache: Path | None,
) -> Fit:
    """The micro-batch asked for, or measured on CUDA and estimated elsewhere; the smallest within 2 % of the best rate.

    What was measured is kept in the JSON file `cache`. Call it before anything else lies in the card's memory.
    """
    sequences = Ramp(model, train).sequences
    precision = resolve_precision(train, device)
    with torch.device("meta"):
        parameters = Model(model, vocab_size).parameter_count()
    guess = fitting_micro_batch(sequences, parameters, model, vocab_size, device, precision)
    if train.micro_batch or device.type != "cuda":
        size = train.micro_batch or guess
        return Fit(micro_batch=size, eval_batch=guess)
    case = Case(
        card=device_name(device),
        torch=torch.__version__,
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
        if each.case == case:
            return each.fit
    logger.info("finding the micro-batch for this card and model: a few minutes, once")
    try:
        fit = measure_apart(model, optim, train, vocab_size, device, max(1, guess // 4))
    except BrokenProcessPool:
        fit = None
    if fit is None:
        logger.warning("the micro-batch could not be measured; estimated: %d sequences", guess)
        return Fit(micro_batch=guess, eval_batch=guess)
    if cache is not None:
        make_folder(cache.parent)
        publish_bytes(cache, msgspec.json.format(msgspec.json.encode([*known, _Known(case, fit)])) + b"\n")
    return fit


def measure_apart(
    model: ModelConfig, optim: OptimConfig, train: TrainConfig, vocab_size: int, device: torch.device, start: int
) -> Fit | None:
    """`measure` in a process of its own. BrokenProcessPool when that process dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, model, optim, train, vocab_size, str(device), start).result()


def measure(
    model: ModelConfig, optim: OptimConfig, train: TrainConfig, vocab_size: int, device_: str, start: int
) -> Fit | None:
    """Real steps on random tokens, about `start` sequences at once and upwards; None when not even one fits."""
    device = torch.device(device_)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((1 - HEADROOM) * free / total, device)
    trial = Trial(model, optim, train, vocab_size, device)
    sequences = Ramp(model, train).sequences
    sizes = _doubling([size for size in range(1, sequences + 1) if sequences % size == 0])
    rates = search(sizes, start, trial.training_rate)
    if not rates:
        return None
    micro_batch = choose(rates)
    eval_sizes = [size for size in (2**i for i in range(20)) if size <= max(micro_batch, MOST_EVALUATED)]
    eval_rates = search(eval_sizes, micro_batch, trial.evaluation_rate)
    eval_batch = choose(eval_rates) if eval_rates else 1
    return Fit(micro_batch=micro_batch, eval_batch=eval_batch, rates=rates, eval_rates=eval_rates)


def search(sizes: list[int], start: int, rate: Callable[[int], float | None]) -> dict[int, float]:
    """The rate of each size tried: upwards from the last that is at most `start`, while it grows and fits.

    `rate` says None where the memory runs out; when it does at once, smaller sizes are tried.
    """
    first = max(i for i, size in enumerate(sizes) if i == 0 or size <= start)
    rates: dict[int, float] = {}
    for size in sizes[first:]:
        found = rate(size)
        if found is None or found <= max(rates.values(), default=0.0):
            break
        rates[size] = found
    for size in reversed(sizes[:first]):
        if rates:
            break
        if (found := rate(size)) is not None:
            rates[size] = found
    return rates


def choose(rates: dict[int, float]) -> int:
    """The smallest size within 2 % of the best rate."""
    return min(size for size, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))


class Trial:
    """A model like the run's, with random tokens and its real optimizers."""

    WARM, TIMED = 2, 4  # forward and backward passes; the first compiles, and makes the optimizers' state

    def __init__(
        self, config: ModelConfig, optim: OptimConfig, train: TrainConfig, vocab_size: int, device: torch.device
    ) -> None:
        precision = resolve_precision(train, device)
        self.device, self.train = device, train
        self.model = Model(config, vocab_size).to(device)
        self.model.checkpoint_activations = train.checkpoint_activations
        self.stepper = Stepper(
            self.model,
            Optimizers(self.model, optim),
            optim.clip,
            lambda: autocast(device, precision),
            loss_scaler(device, precision),
        )

    def update(self) -> None:
        """The step of the optimizers, whatever the loss was."""
        self.stepper.update(torch.zeros((), device=self.device))

    def training_rate(self, size: int) -> float | None:
        """Tokens a second, forward and backward, with an optimizer step to either side of the timed passes."""

        def step(batch: Batch, passes: int) -> None:
            for _ in range(passes):
                self.stepper.learn(batch)

        return self._rate(size, step, self.update)

    def evaluation_rate(self, size: int) -> float | None:
        """Tokens a second, forward alone, the optimizers' state being there."""

        def step(batch: Batch, passes: int) -> None:
            self.model.eval()
            with torch.no_grad(), self.stepper.autocast():
                for _ in range(passes):
                    self.model.loss(*batch)

        return self._rate(size, step, lambda: None)

    def batch(self, size: int) -> Batch:
        """`size` sequences of random tokens; from here on the model is compiled for as many."""
        if wants_compile(self.train, self.device):
            compile_model(self.model)
        seq_len = self.model.config.seq_len
        ids = torch.randint(self.model.vocab_size, (size, seq_len + 1), device=self.device)
        documents = None
        if self.train.document_mask:  # as many as text has, about: an end every 512 tokens
            ends = ends_of(np.arange(0, size * seq_len, 512), size, seq_len)
            documents = torch.from_numpy(ends).to(self.device)
        return Batch(ids[:, :-1], ids[:, 1:], documents)

    def now(self) -> float:
        """Seconds, when the device has done all that was asked of it."""
        synchronize(self.device)
        return time.perf_counter()

    def _rate(self, size: int, run: Callable[[Batch, int], None], after: Callable[[], object]) -> float | None:
        try:
            batch = self.batch(size)
            for _ in range(self.WARM):
                run(batch, self.WARM)
                after()
            began = self.now()
            run(batch, self.TIMED)
            seconds = self.now() - began
            after()
        except torch.OutOfMemoryError:
            seconds = 0.0
        if not seconds:
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        return self.TIMED * size * self.model.config.seq_len / seconds


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
    except (OSError, msgspec.MsgspecError):
        return []
