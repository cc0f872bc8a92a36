"""Averages gradients over all ranks while the last backward pass of a step is still running.

Parameters are reduced in buckets, last layer first, which is the order in which a backward pass completes their
gradients. A bucket is started when all its gradients are complete and every bucket before it has been started: ranks
must start the same reductions in the same order. Which bucket a gradient is in never changes, so that neither timing
nor a resume can change a bit of the sum.

What torch.compile makes one graph completes its gradients together, at the graph's end: of a compiled model, only the
gradient of an untied head is reduced during the backward pass, the others right after it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.machine.ranks import World

BUCKET_NBYTES = 32 << 20  # reduced at once: much less is bound by latency


class Reducer:
    """Replaces the gradients of `parameters`, all of one type and on one device, by their means over all ranks.

    A step's last backward pass runs in `overlap()`; `finish()` follows. In a world of one, there are no hooks and both
    do nothing.

    When memory runs out in the last backward pass, the rank may repeat the step's passes while the others do not. The
    buckets it has started hold complete gradients: it keeps them, drops their gradients of the repeated passes, and
    does not start them again. So every rank starts each bucket once a step, whatever happens on the others.
    """

    def __init__(self, world: World, parameters: Iterable[nn.Parameter]) -> None:
        self._world = world
        self._buckets = [] if world.size == 1 else _buckets(list(parameters)[::-1])
        self._incomplete: list[int] = []  # gradients that each bucket still lacks, in `overlap()` only
        self._started: list[_Started | None] = []  # the step's buckets so far, None for one without gradients
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]

    @contextmanager
    def overlap(self) -> Iterator[None]:
        """A backward pass in here starts each bucket as soon as it is complete, and takes its gradients away."""
        self._incomplete = [len(bucket) for bucket in self._buckets]
        try:
            yield
        finally:
            self._incomplete = []

    def finish(self, loss: Tensor) -> None:
        """Replace the gradients, and `loss`, by their means over all ranks, the same bits on each.

        A parameter without a gradient has none on any rank. On CUDA, nothing here waits for the device.
        """
        while len(self._started) < len(self._buckets):
            self._start()
        wait_for_loss = self._world.average(loss)
        for started in self._started:
            if started is not None:
                started.finish()
        wait_for_loss()
        self._started = []

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def completed(_parameter: Tensor) -> None:
            if not self._incomplete:
                return
            self._incomplete[number] -= 1
            while len(self._started) < len(self._buckets) and not self._incomplete[len(self._started)]:
                self._start()

        return completed

    def _start(self) -> None:
        """Start the next bucket, which takes its gradients away. It has not been started when memory runs out here."""
        bucket = self._buckets[len(self._started)]
        parameters = [parameter for parameter in bucket if parameter.grad is not None]
        pieces = [parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None]
        if not pieces:
            self._started.append(None)
            return
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        self._started.append(_Started(parameters, flat, self._world.average(flat)))
        for parameter in parameters:
            parameter.grad = None  # its memory is free for the rest of the backward pass


class _Started(NamedTuple):
    """A bucket in flight: its parameters, their gradients end to end, and what waits for the mean."""

    parameters: list[nn.Parameter]
    flat: Tensor
    wait: Callable[[], None]

    def finish(self) -> None:
        """Give each parameter its mean gradient, a view of the bucket."""
        self.wait()
        pieces = torch.split(self.flat, [parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of at most BUCKET_NBYTES; one that is larger is a bucket of its own."""
    buckets: list[list[nn.Parameter]] = []
    nbytes = 0
    for parameter in parameters:
        if not buckets or nbytes + parameter.nbytes > BUCKET_NBYTES:
            buckets.append([])
            nbytes = 0
        buckets[-1].append(parameter)
        nbytes += parameter.nbytes
    return buckets
