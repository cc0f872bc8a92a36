"""Who builds the parts: this process, a pool of others, or a Ray cluster. What is built is the same."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any, NamedTuple

import msgspec

from prepare.builder import Advance, Builder, Job
from prepare.parts import Part
from shards.errors import HostError, MillpondError
from shards.manifest import PartRecord


class Pool(NamedTuple):
    """`submit` starts a part, `depth` of them are worth having under way, `poll()` tells `advance` what has come."""

    submit: Callable[[Part], "Future[PartRecord]"]
    depth: int
    poll: Callable[[], None] = lambda: None


def open_pool(job: Job, workers: int, *, on_ray: bool, advance: Advance) -> AbstractContextManager[Pool]:
    """A pool of `workers` processes; of the cluster's cores `on_ray`. One worker is this process itself."""
    if on_ray:
        return _ray(job, advance)
    return _here(job, advance) if workers <= 1 else _processes(job, workers, advance)


@contextmanager
def _here(job: Job, advance: Advance) -> Iterator[Pool]:
    builder: Builder | None = None

    def submit(part: Part) -> "Future[PartRecord]":
        nonlocal builder
        builder = builder or Builder(job, advance)
        future: Future[PartRecord] = Future()
        future.set_result(builder.build(part))
        return future

    yield Pool(submit, 1)


@contextmanager
def _processes(job: Job, workers: int, advance: Advance) -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("Q"), context.Event()
    shown = 0

    def poll() -> None:
        nonlocal shown
        now = done.value
        advance(now - shown)
        shown = now

    with ProcessPoolExecutor(workers, context, _start_worker, (job, done, stop)) as pool:

        def submit(part: Part) -> "Future[PartRecord]":
            with _no_interrupt():
                return pool.submit(_build, part)

        try:
            yield Pool(submit, 2 * workers, poll)
        except BrokenProcessPool as error:
            raise HostError(
                "a worker process was killed or did not start, most likely because memory ran out",
                "the parts that were sealed are kept",
                f"run again with fewer than {workers} workers: --set tokens.workers=1",
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that start here are born deaf to Ctrl-C, which the terminal sends to them as well."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours comes when it is unblocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(MillpondError):
    pass


_builder: Builder


def _start_worker(job: Job, done: Any, stop: Any) -> None:
    """Set up one process of the pool: signals are the parent's to handle, and the parent's death is the worker's."""
    global _builder
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal tells them too
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()

    def advance(tokens: int) -> None:
        with done.get_lock():
            done.value += tokens
        if stop.is_set():
            raise _Stopped("stopped")

    _builder = Builder(job, advance)


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _build(part: Part) -> PartRecord:
    return _builder.build(part)


@contextmanager
def _ray(job: Job, advance: Advance) -> Iterator[Pool]:
    """Plain tasks on the cluster that RAY_ADDRESS names, else on one of this machine. The home folder and the source
    files must lie on a file system that every node sees under the same path, and millpond be installed there."""
    try:
        import ray
    except ImportError as error:
        raise HostError(
            'tokens.engine is "ray", and Ray is not installed',
            "",
            ".venv/bin/pip install -c constraints.txt -e '.[ray]'",
        ) from error
    mine = not ray.is_initialized()
    _require_reachable(os.environ.get("RAY_ADDRESS", ""))
    if mine:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    task = ray.remote(num_cpus=1)(_build_on_ray)
    shared = ray.put(msgspec.structs.replace(job, folder=job.folder.absolute()))

    def submit(part: Part) -> "Future[PartRecord]":
        future: Future[PartRecord] = task.remote(shared, part).future()
        future.add_done_callback(lambda done: None if done.exception() else advance(_tokens(done.result())))
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
    """HostError when nobody listens at `address`: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise HostError(
            f"RAY_ADDRESS is {address}, and nobody answers there: {error.strerror or error}",
            "",
            "start the cluster, or unset RAY_ADDRESS for one on this machine",
        ) from error


def _tokens(record: PartRecord) -> int:
    return record.train.tokens + record.val.tokens


_builders: dict[str, Builder] = {}


def _build_on_ray(job: Job, part: Part) -> PartRecord:
    key = f"{job.folder} {job.engine}"
    if key not in _builders:
        _builders[key] = Builder(job, lambda _: None)
    return _builders[key].build(part)
