"""Several processes that train together over gloo, and what they are asked to do there; each is a real process."""

import faulthandler
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

    def __init__(self, pool: ProcessPoolExecutor, size: int, cards: bool) -> None:
        self._pool, self.size, self._cards = pool, size, cards

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(world, *arguments)` gives on each rank, or the exception it raised there."""
        port = _free_port()
        calls = [
            self._pool.submit(_as_rank, rank, self.size, port, self._cards, function, arguments)
            for rank in range(self.size)
        ]
        return [call.exception() or call.result() for call in calls]


@contextmanager
def ranks(size: int, *, cards: bool = False) -> Iterator[Ranks]:
    """Start them, on the CPU or each on a card of its own; a process takes one call of `run` at a time."""
    with ProcessPoolExecutor(size, get_context("spawn")) as pool:
        yield Ranks(pool, size, cards)


def end_together(size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function(world, *arguments)` in `size` processes that end with it, each in its own way."""
    port = _free_port()
    started = [
        get_context("spawn").Process(target=_as_rank, args=(rank, size, port, False, function, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _as_rank(
    rank: int, size: int, port: int, cards: bool, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    from train.machine.ranks import joined

    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a rank that fails alone leaves the other waiting
    try:
        with joined("cuda" if cards else "cpu") as world:
            return function(world, *arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()
