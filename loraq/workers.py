"""Layers in flight: on which devices, how many at once, and each read, fitted and kept by threads of its own kind.

    one thread reads a layer ahead -> `count` threads fit, each bound to a device -> one thread writes and syncs

So neither a cold file nor a slow disk holds up a fit. Torch's operations and the Numba kernels release the
interpreter's lock. No result depends on how many workers there are, on which device of several alike, or who finishes
first. In a team of processes (loraq/team.py) each draws its next layer from one queue, and all learn all results.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import attrs
import torch

from loraq.errors import InputError
from loraq.team import POLL, Team

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 1
"""Layers read before a worker is free for them; more would lie idle here while another process has nothing to do."""


def resolved_device(device: str) -> torch.device:
    """The torch device that a recipe's `device` means. Raises InputError where it is not to be had."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device '{device}' is not to be had here ({reason}); use 'auto' or 'cpu'.") from None
    if found.type == "meta":
        raise InputError("device 'meta' computes nothing; use 'auto' or 'cpu'.")
    return found


def name_of(device: torch.device) -> str:
    """What a device is called where results may depend on it: its model."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def resolved_devices(device: str | Sequence[str]) -> tuple[torch.device, ...]:
    """The torch devices that a recipe's `device` means: "auto" is all GPUs of the first one's model, or the CPU.

    Raises InputError where one is not to be had, or where two would give different bytes.
    """
    if device == "auto" and torch.cuda.is_available():
        every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return tuple(each for each in every if name_of(each) == name_of(every[0]))
    named = [device] if isinstance(device, str) else device
    found = tuple(resolved_device(each) for each in named)
    for each, called in zip(found, named, strict=True):
        if name_of(each) != name_of(found[0]):
            raise InputError(
                f"device '{called}' is {_told(each)}, but '{named[0]}' is {_told(found[0])}, and their results differ "
                "in bits; list devices of one model."
            )
    return found


def _told(device: torch.device) -> str:
    return "a CPU" if device.type == "cpu" else f"a GPU of model {name_of(device)}"


@attrs.frozen(eq=False)
class Workers:
    """The layers in flight of this process: `count` fits at once over `devices`, each with `threads` torch threads."""

    devices: tuple[torch.device, ...]
    count: int
    threads: int
    team: Team = attrs.field(factory=Team)

    @classmethod
    def of(cls, device: str | Sequence[str], workers: int, threads: int, team: Team | None = None) -> Workers:
        """What `device`, `workers` and `threads` of a recipe's [run] mean for this process of a team.

        The processes on one machine share its devices out; 0 workers are as many as fill this process's share of the
        cores that it may use, and one a device at least.
        """
        team = team or Team()
        every = resolved_devices(device)
        mine = every[team.local_number :: team.local_size] or (every[team.local_number % len(every)],)
        cores = len(os.sched_getaffinity(0)) // team.local_size
        return cls(mine, workers or max(len(mine), cores // threads), threads, team)

    @property
    def device(self) -> torch.device:
        """The first device, for work that is not spread."""
        return self.devices[0]


def in_parallel(
    fit: Callable[[Item, Any, torch.device], Any],
    items: Sequence[Item],
    *,
    workers: Workers,
    read: Callable[[Item], Any] | None = None,
    keep: Callable[[Item, Any], Any] | None = None,
) -> Iterator[tuple[Item, Any]]:
    """(item, keep(item, fit(item, read(item), device))) of every item, as they finish, whichever process did it.

    Every process of the team must give the same items in the same order, and results that JSON can hold. The first
    error ends it: what is in flight is finished and kept, nothing new is begun.
    """
    flow = _Flow(items, read or _nothing, fit, keep or _as_it_is, workers)
    try:
        yield from flow.results()
    finally:
        flow.end()


def _nothing(item: object) -> None:
    del item


def _as_it_is(item: object, result: Result) -> Result:
    del item
    return result


class _Flow(Generic[Item]):
    """Items on their way through reading, fitting and keeping. Only the thread that asks for results changes it."""

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Any],
        fit: Callable[[Item, Any, torch.device], Any],
        keep: Callable[[Item, Any], Any],
        workers: Workers,
    ) -> None:
        self._items, self._read, self._fit, self._keep, self._workers = items, read, fit, keep, workers
        self._queue = workers.team.queue()
        self._drained = not items
        self._reading: dict[Future[Any], int] = {}
        self._waiting: deque[tuple[int, Any]] = deque()
        self._fitting: dict[Future[Any], int] = {}
        self._keeping: dict[Future[Any], int] = {}
        self._local = threading.local()
        self._devices = itertools.cycle(workers.devices)
        self._outside = torch.get_num_threads()
        self._reader = ThreadPoolExecutor(1, "reader", torch.set_num_threads, (workers.threads,))
        self._fitter = ThreadPoolExecutor(workers.count, "fitter", self._begin_fitting)
        self._keeper = ThreadPoolExecutor(1, "keeper", torch.set_num_threads, (workers.threads,))

    def _begin_fitting(self) -> None:
        """A thread that fits begins: it has its device for life."""
        torch.set_num_threads(self._workers.threads)
        device = next(self._devices)  # safe from several threads, as every single call into itertools is
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._local.device = device

    def results(self) -> Iterator[tuple[Item, Any]]:
        left = len(self._items)
        while left:
            self._start()
            running = [*self._reading, *self._fitting, *self._keeping]
            if running:
                wait(running, timeout=None if self._workers.team.alone else POLL, return_when=FIRST_COMPLETED)
            else:  # the others are at work on the last
                time.sleep(POLL)
            for place, result in (*self._finished(), *self._queue.posted()):
                left -= 1
                yield self._items[place], result

    def _start(self) -> None:
        """Begin whatever has room."""
        room = 2 * self._workers.count - len(self._keeping)  # where the disk is slow, results must not pile up
        while self._waiting and len(self._fitting) < min(self._workers.count, room):
            place, loaded = self._waiting.popleft()
            self._fitting[self._fitter.submit(self._fitted, place, loaded)] = place
        while not self._drained and len(self._reading) + len(self._waiting) < _AHEAD:
            place = self._queue.draw()
            self._drained = place >= len(self._items)
            if not self._drained:
                self._reading[self._reader.submit(self._read, self._items[place])] = place

    def _fitted(self, place: int, loaded: Any) -> Any:
        return self._fit(self._items[place], loaded, self._local.device)

    def _finished(self) -> list[tuple[int, Any]]:
        """Move on what is done; what is kept is finished."""
        for future in [each for each in self._reading if each.done()]:
            self._waiting.append((self._reading.pop(future), future.result()))
        for future in [each for each in self._fitting if each.done()]:
            self._begin_keeping(self._fitting.pop(future), future.result())
        found = []
        for future in [each for each in self._keeping if each.done()]:
            place = self._keeping.pop(future)
            found.append((place, future.result()))
            self._queue.post(*found[-1])
        return found

    def _begin_keeping(self, place: int, result: Any) -> None:
        self._keeping[self._keeper.submit(self._keep, self._items[place], result)] = place

    def end(self) -> None:
        """Finish what is in flight, and keep it."""
        self._reader.shutdown(cancel_futures=True)
        for future, place in self._fitting.items():
            if future.exception() is None:
                self._begin_keeping(place, future.result())
        self._fitter.shutdown()
        self._keeper.shutdown()
        torch.set_num_threads(self._outside)
