"""The data-parallel ranks of a run, one process for each device, started by torchrun; one by default.

Rank 0 decides and writes, the others learn with it. Gradients go over NCCL between GPUs, everything else over gloo,
where a wait may last as long as rank 0 prepares. No rank begins a step before all are there.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import msgspec

from shards.errors import HostError, Interrupted
from train.config import DeviceName

if TYPE_CHECKING:  # a verb that asks who it is need not load it
    import torch
    import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # for rank 0, which may prepare a corpus; a process that dies is noticed at once
GPU_PATIENCE = timedelta(hours=1)  # all ranks are there when it begins: one may still compile, or save


class World:
    """Rank `rank` of `size` processes. Alone, every method gives back what it was given, and torch is not loaded."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._gpus: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    def average(self, tensor: "torch.Tensor") -> Callable[[], None]:
        """Begin to replace `tensor`, which is contiguous, by its mean over all ranks, the same bits on each.

        The function returned waits until that is done; on CUDA, the stream does and the host does not. Every rank
        averages tensors of the same shapes in the same order.
        """
        if self.size == 1:
            return lambda: None
        import torch.distributed as dist

        with _peer_errors():
            work = dist.all_reduce(tensor.div_(self.size), group=self._gpus, async_op=True)

        def wait() -> None:
            with _peer_errors():
                work.wait()

        return wait

    def sum(self, *values: float) -> list[float]:
        """The sums of `values` over all ranks, in fp64 and with the same bits everywhere."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        with _peer_errors():
            dist.all_reduce(sums)
        return sums.tolist()

    def most(self, value: int) -> int:
        """The greatest `value` of all ranks: how they agree on what only one of them has seen, a signal or a clock."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        found = torch.tensor(value)
        with _peer_errors():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def first(self, work: Callable[[], T], kind: type[T]) -> T:
        """What `work`, called on rank 0 alone, gives; it travels as JSON, and the others wait as long as it takes."""
        if self.size == 1:
            return work()
        import torch

        data = msgspec.json.encode(work()) if self.is_first else b""
        nbytes = torch.tensor(len(data))
        self._from_first(nbytes)
        sent = torch.frombuffer(bytearray(data or bytes(int(nbytes))), dtype=torch.uint8)
        self._from_first(sent)
        return msgspec.json.decode(sent.numpy().tobytes(), type=kind)

    def gather(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """Everyone's `tensor`, by rank, each of the same shape and on the CPU."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with _peer_errors():
            dist.all_gather(found, tensor)
        return found

    def _from_first(self, tensor: "torch.Tensor") -> None:
        import torch.distributed as dist

        with _peer_errors():
            work = dist.broadcast(tensor, 0, async_op=True)
            while not work.is_completed():  # wait() would not let a signal in
                time.sleep(0.01)
            work.wait()


@contextmanager
def joined(wanted: DeviceName = "auto") -> Iterator[World]:
    """The world that torchrun's environment describes, connected; alone without one. `wanted` is train.device."""
    rank, size = _place()
    world = World(rank, size)
    if size == 1:
        yield world
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn.functional  # loaded after init, its defaults would hold the group for ever

    from train.machine.device import pick_device

    device = pick_device(wanted)
    with _peer_errors():
        dist.init_process_group("gloo", timeout=PATIENCE)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            world._gpus = dist.new_group(backend="nccl", timeout=GPU_PATIENCE)
    left = False
    try:
        yield world
        left = True
    except Interrupted:
        left = True
        raise
    finally:
        if left:  # otherwise the others may be gone already, and to take leave of them would wait for them
            dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process of this run has failed yet: what follows from a failure needs no message of its own."""
    if _place()[1] > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, which outlives us
        from torch.distributed.rendezvous import rendezvous

        with suppress(RuntimeError):  # it is gone: better said twice than never
            store = next(rendezvous("env://", timeout=timedelta(seconds=10)))[0]
            return bool(store.add("failed", 1) == 1)
    return True


def is_silent() -> bool:
    """Whether another process speaks for this one."""
    return _place()[0] > 0


def _place() -> tuple[int, int]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """HostError when another rank has ended: it has said why, or was killed. A fault of this rank's GPU passes through.

    Memory that runs out in here is a HostError, too: the others may be waiting for what was being started.
    """
    import torch

    from train.machine.memory import is_out_of_memory

    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        if is_out_of_memory(error):
            raise HostError(
                f"out of memory in an exchange with the other processes: {reason}",
                "an exchange cannot be repeated by one process alone; everything up to the last checkpoint is kept",
                "run the same command again with a smaller train.micro_batch",
            ) from error
        if isinstance(error, torch.AcceleratorError) or reason.startswith("CUDA error"):
            raise
        raise HostError(
            f"another process of this run has ended: {reason}",
            "they learn together or not at all; everything up to the last checkpoint is kept",
            "rerun the same command to resume",
        ) from error
