"""Running a compiled worker in several threads: torch's own, where torch uses GNU OpenMP.

torch's threads spin for a while after each of its operations, waiting for the next. Threads of our own would fight with
them for the cores, so the worker is started through torch's copy of libgomp (`GOMP_parallel`), whose pool torch has
made anyway: no second pool, no thread to wake, and as many threads as torch uses. Each Python thread has a pool of its
own there, so that several may call at once. Where there is no such library (macOS, Windows) a pool of Python threads
does it; the worker holds no lock of Python's either way. As with torch's own operations, a forked process must keep to
one thread where its parent has used several.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

Start = Callable[[int, int, int], None]
"""(address of the worker, address of its argument, how many threads)."""

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@functools.cache
def worker(address: int) -> Callable[[int], None]:
    """The compiled worker at `address` as a Python function, which releases the global lock while it runs."""
    return _WORKER(address)


@functools.cache
def start() -> Start:
    """How to run a worker in several threads; returns when all are done."""
    return _openmp() or _python_threads


def _openmp() -> Start | None:
    """Through the libgomp that this process has loaded, torch's own first; None where there is none."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = sorted(set(re.findall(r"/\S*libgomp\S*\.so\S*", mapped)), key=lambda path: "torch" not in path)
    for path in found:
        try:
            parallel = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None

        def run(worker: int, argument: int, threads: int, parallel: Callable[..., None] = parallel) -> None:
            parallel(worker, argument, threads, 0)

        return run
    return None


@functools.cache
def _pool(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """A pool of Python threads; its own in a forked process, where the parent's threads are gone."""
    del process
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="loraq")


def _python_threads(address: int, argument: int, threads: int) -> None:
    """The caller works too, so that a busy pool cannot hold it up: a worker that comes late finds no task left."""
    function = worker(address)
    others = [_pool(os.getpid()).submit(function, argument) for _ in range(threads - 1)]
    function(argument)
    for other in others:
        if not other.cancel():
            other.result()
