"""Real steps on random tokens, to say how fast this GPU does how many sequences at once."""

import gc
import time
from collections.abc import Callable

import numpy as np
import torch

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.batch import Batch
from train.data.document_ends import ends_of
from train.machine.compile import compile_model, wants_compile
from train.machine.device import autocast, loss_scaler, resolve_precision, synchronize
from train.machine.memory import is_out_of_memory
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.step import Stepper

TIMED_SECONDS = 2.0  # at least: a GPU's clock and a short timing each move by more than the 2 % that decide


class Trial:
    """A model like the run's, with random tokens and its real optimizers."""

    WARM = 2  # forward and backward passes, twice; the first compiles, and makes the optimizers' state

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
            ends = ends_of(np.arange(0, size * seq_len, 512), size, seq_len, seq_len / 512)
            documents = torch.from_numpy(ends).to(self.device)
        return Batch(ids[:, :-1], ids[:, 1:], documents)

    def now(self) -> float:
        """Seconds, when the device has done all that was asked of it."""
        synchronize(self.device)
        return time.perf_counter()

    def _rate(self, size: int, run: Callable[[Batch, int], None], after: Callable[[], object]) -> float | None:
        try:
            batch = self.batch(size)
            for _ in range(2):
                run(batch, self.WARM)
                after()
            began, passes = self.now(), 0
            while (seconds := self.now() - began) < TIMED_SECONDS:
                more = max(2, passes)  # doubled, so that few of them wait for the device
                run(batch, more)
                passes += more
            after()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            passes = 0
        if not passes:
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        return passes * size * self.model.config.seq_len / seconds
