"""Who builds the parts: this process, a pool of others, or a Ray cluster. What is built is the same."""

import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, assert_never

import msgspec

from prepare.config import Executor
from prepare.part_builder import Advance, Builder, FolderSpec
from prepare.parts import Part
from shards.errors import HostError, MillpondError, converted
from shards.manifest import PartRecord

STOP_SECONDS = 0.2  # between two looks at whether all is over
END_SECONDS = 10.0  # that a worker has to clean up what it was at


class Pool(NamedTuple):
    """`submit` starts a part, `depth` of them are worth having under way, `poll()` tells `advance` what has come."""

    submit: Callable[[Part], "Future[PartRecord]"]
    depth: int
    poll: Callable[[], None] = lambda: None


def open_pool(spec: FolderSpec, workers: int, *, executor: Executor, advance: Advance) -> AbstractContextManager[Pool]:
    """A pool of `workers` processes here, or of the Ray cluster's cores. One worker is this process itself."""
    match executor:
        case "local":
            return _here(spec, advance) if workers <= 1 else _processes(spec, workers, advance)
        case "ray":
            return _ray(spec, advance)
        case _:
            assert_never(executor)


@contextmanager
def _here(spec: FolderSpec, advance: Advance) -> Iterator[Pool]:
    builder: Builder | None = None

    def submit(part: Part) -> "Future[PartRecord]":
        nonlocal builder
        builder = builder or Builder(spec, advance)
        future: Future[PartRecord] = Future()
        future.set_result(builder.build(part))
        return future

    yield Pool(submit, 1)


@contextmanager
def _processes(spec: FolderSpec, workers: int, advance: Advance) -> Iterator[Pool]:
    over, come = threading.Event(), SimpleQueue[int]()
    mine, started = threading.local(), list[_Worker]()

    def start() -> None:
        _ignore_interrupts()
        mine.worker = _Worker(spec, over, come)
        started.append(mine.worker)

    def poll() -> None:
        while not come.empty():
            advance(come.get())

    with ThreadPoolExecutor(workers, "worker") as threads:

        def build(part: Part) -> PartRecord:
            if not hasattr(mine, "worker"):
                start()
            worker: _Worker = mine.worker
            return worker.build(part)

        try:
            yield Pool(lambda part: threads.submit(build, part), 2 * workers, poll)
        finally:
            over.set()
            threads.shutdown(cancel_futures=True)
            for worker in started:
                worker.end()


class _Worker:
    """A process that builds parts, and the pipe to it: parts there, and back how many tokens are done, then a record.

    There is no lock or queue that it shares with the others: one that is killed stops no other.
    """

    def __init__(self, spec: FolderSpec, over: threading.Event, come: "SimpleQueue[int]") -> None:
        context = multiprocessing.get_context("spawn")
        self._over, self._come, self._killed = over, come, _killed_for_memory()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        try:
            self._process.start()
        except OSError as error:
            raise HostError(
                f"no worker process could be started: {error.strerror or error}",
                "the parts that were sealed are kept",
                "run again with --set tokens.workers=1",
            ) from error
        finally:
            theirs.close()

    def build(self, part: Part) -> PartRecord:
        """The part's record. What its process raises is raised here; HostError when it dies."""
        try:
            self._pipe.send(part)
            while not self._over.is_set():
                if not self._pipe.poll(STOP_SECONDS):
                    continue
                message = self._pipe.recv()
                if isinstance(message, PartRecord):
                    return message
                if isinstance(message, BaseException):
                    raise message
                self._come.put(message)
        except (EOFError, ConnectionError, BrokenPipeError) as error:
            self._process.join()
            raise _death_of(self._process.exitcode, _killed_for_memory() > self._killed) from error
        raise CancelledError

    def end(self) -> None:
        """Let it clean up what it was at, and wait for it."""
        self._pipe.close()
        self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()


def _death_of(code: int | None, for_memory: bool) -> HostError:
    """Why a worker process died, from its exit code."""
    if for_memory and code == -signal.SIGKILL:
        what, fix = "memory ran out: the kernel killed a worker process", "run again with --set tokens.workers=1"
    elif code is not None and code < 0:
        what = f"a worker process was ended by {signal.Signals(-code).name}"
        fix = "run the same command again; if it happens again, with --set tokens.workers=1"
    else:
        what = f"a worker process ended with exit code {code}"
        fix = "look at what it printed above, then run the same command again"
    return HostError(what, "the parts that were sealed are kept", fix)


def _killed_for_memory() -> int:
    """How many processes this machine's kernel has killed because memory ran out; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _ignore_interrupts() -> None:
    """Processes that this thread starts are born deaf to Ctrl-C, which the terminal sends to them as well."""
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours goes to the main thread


class _Stopped(MillpondError):
    pass


def _serve(pipe: "Connection[Any, Any]", spec: FolderSpec) -> None:
    """The life of a worker process. Signals are the parent's to handle, and the parent's death is its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal tells it too
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()

    def advance(tokens: int) -> None:
        if pipe.poll():  # nothing is sent while it builds: the other end was closed
            raise _Stopped("stopped")
        pipe.send(tokens)

    builder: Builder | None = None
    while True:
        try:
            part = pipe.recv()
        except (EOFError, ConnectionError):
            return
        answer: PartRecord | Exception
        try:
            builder = builder or Builder(spec, advance)
            answer = builder.build(part)
        except Exception as error:
            answer = converted(error)
        try:
            pipe.send(answer)
        except OSError:
            return


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


@contextmanager
def _ray(spec: FolderSpec, advance: Advance) -> Iterator[Pool]:
    """Plain tasks on the cluster that RAY_ADDRESS names, else on one of this machine. The home folder and the source
    files must be on a file system that every node sees under the same path, and millpond be installed there."""
    try:
        import ray
    except ImportError as error:
        raise HostError(
            'tokens.executor is "ray", and Ray is not installed',
            "",
            ".venv/bin/pip install -c constraints.txt -e '.[ray]'",
        ) from error
    mine = not ray.is_initialized()
    _require_reachable(os.environ.get("RAY_ADDRESS", ""))
    if mine:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    task = ray.remote(num_cpus=1)(_build_on_ray)
    shared = ray.put(msgspec.structs.replace(spec, folder=spec.folder.absolute()))

    def submit(part: Part) -> "Future[PartRecord]":
        future: Future[PartRecord] = task.remote(shared, part).future()
        future.add_done_callback(lambda done: None if done.exception() else advance(done.result().tokens))
        return future

    try:
        yield Pool(submit, 2 * int(ray.cluster_resources().get("CPU", 1)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise HostError(
            f"Ray: {str(error).splitlines()[0]}", "the parts that were sealed are kept", "run the same command again"
        ) from error
    finally:
        if mine:
            ray.shutdown()


def _require_reachable(address: str) -> None:
    """HostError when no server listens at `address`: Ray itself would keep asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise HostError(
            f"RAY_ADDRESS is {address}, and no server answers there: {error.strerror or error}",
            "",
            "start the cluster, or unset RAY_ADDRESS for one on this machine",
        ) from error


_builders: dict[str, Builder] = {}


def _build_on_ray(spec: FolderSpec, part: Part) -> PartRecord:
    key = f"{spec.folder} {spec.engine}"
    if key not in _builders:
        _builders[key] = Builder(spec, lambda _: None)
    return _builders[key].build(part)
