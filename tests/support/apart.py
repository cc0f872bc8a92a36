"""Work in a process of its own, which is killed together with all it started when its time is up."""

import logging
import multiprocessing
import os
import signal
import subprocess
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class Failed(Exception):
    """The process raised an exception (its traceback is on stderr) or died; the message says which."""


def apart(limit: float, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of `function`. TimeoutError after `limit` seconds, Failed when there is none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments, named))
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(0.0, limit)):
            raise TimeoutError
        result, error = receiver.recv()
        process.join(10)
    except EOFError:
        process.join(10)
        raise Failed(f"the process ended with exit code {process.exitcode}") from None
    finally:
        _kill(process.pid)
        process.kill()
        process.join()
    if error:
        raise Failed(error)
    return result


def printed(limit: float, command: list[str]) -> str:
    """What `command` prints. TimeoutError after `limit` seconds, Failed when its exit code is not 0."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=max(0.0, limit))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            _kill(process.pid)
    if process.returncode:
        raise Failed(f"the command ended with exit code {process.returncode}")
    return output


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], named: Any) -> None:
    os.setsid()  # a group of its own, so that what it starts can be killed with it
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        sender.send((function(*arguments, **named), ""))
    except Exception as error:
        traceback.print_exc()
        sender.send((None, " ".join(f"{type(error).__name__}: {error}".split())[:300]))


def _kill(group: int | None) -> None:
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
