"""Several processes that train together over gloo, and what they are asked to do there; each is a real process."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

LONGEST = 60.0  # seconds; what hangs is a fault


class Ranks:
    """`size` processes that wait for work; each call of `run` is one world, joined and left again."""

    def __init__(self, pool: ProcessPoolExecutor, size: int) -> None:
        self._pool, self.size = pool, size

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(world, *arguments)` gives on each rank, or the exception it raised there."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        calls = [self._pool.submit(_as_rank, rank, self.size, port, function, arguments) for rank in range(self.size)]
        return [call.exception(LONGEST) or call.result() for call in calls]


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Start them. A process takes one call at a time, so that a world of `size` is spread over all of them."""
    with ProcessPoolExecutor(size, get_context("spawn")) as pool:
        yield Ranks(pool, size)


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "CUDA_VISIBLE_DEVICES": "",
    }
    from train.world import joined

    with joined() as world:
        return function(world, *arguments)
