"""The memory of an emulated block, global buffers and shared memory, each access checked: emulator.py says for what."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import attrs
import numpy

Array = numpy.ndarray[Any, Any]

_NOBODY, _SEVERAL = -1, -2


class EmulatedError(Exception):
    """A kernel did what a GPU would not forgive, or what would not be the same every time."""


@attrs.frozen(eq=False)
class Memory:
    """A buffer in global memory: its bytes, and which of them hold something."""

    name: str
    start: int
    data: Array = attrs.field(repr=False)
    present: Array = attrs.field(repr=False)
    keeper: Any = attrs.field(repr=False)

    @classmethod
    def of(cls, tensor: Any, name: str = "buffer", *, written: bool = True) -> Memory:
        """The memory of a contiguous torch tensor or numpy array, used in place; `written` False for an output."""
        address, size = _extent(tensor)
        held: Any = (ctypes.c_uint8 * size).from_address(address) if size else b""
        view = numpy.frombuffer(held, numpy.uint8)
        return cls(name, address, view, numpy.full(size, written), tensor)


def _extent(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, numpy.ndarray):
        return int(tensor.ctypes.data), tensor.nbytes
    return int(tensor.data_ptr()), tensor.numel() * tensor.element_size()


class Block:
    """One block: its number, threads and shared memory; the instructions act on the current one."""

    def __init__(self, number: tuple[int, int], threads: int, shared_bytes: int, memories: Sequence[Memory]) -> None:
        self.number = number
        self.threads = threads
        self.memories = memories
        self.shared = numpy.zeros(shared_bytes, numpy.uint8)
        self.present = numpy.zeros(shared_bytes, bool)
        self.writer = numpy.full(shared_bytes, _NOBODY, numpy.int32)
        self.reader = numpy.full(shared_bytes, _NOBODY, numpy.int32)
        self.copies: list[list[tuple[Array, Array, Array]]] = [[]]
        self.fenced = numpy.zeros(shared_bytes, bool)
        self.seen = numpy.zeros(shared_bytes, bool)
        self.numbers = numpy.arange(threads, dtype=numpy.int32)

    # Global memory.

    def _places(self, address: Array, width: int) -> list[tuple[Memory, Array, Array]]:
        """(memory, lanes, (lanes, width) byte numbers) of an access; every lane lies in exactly one memory."""
        if numpy.any(address % numpy.uint64(width)):
            raise EmulatedError(f"misaligned global access of {width} bytes")
        found, left = [], numpy.ones(len(address), bool)
        for memory in self.memories:
            inside = (address >= memory.start) & (address + numpy.uint64(width) <= memory.start + len(memory.data))
            inside &= left
            left &= ~inside
            if inside.any():
                first = (address[inside] - numpy.uint64(memory.start)).astype(numpy.int64)
                found.append((memory, numpy.flatnonzero(inside), first[:, None] + numpy.arange(width)))
        if left.any():
            raise EmulatedError(f"illegal global access of {width} bytes at {hex(int(address[left][0]))}")
        return found

    def read(self, address: Array, width: int, flag: Array) -> Array:
        """(threads, width) bytes; zeros where `flag` is 0."""
        result = numpy.zeros((self.threads, width), numpy.uint8)
        lanes = numpy.flatnonzero(flag)
        for memory, which, bytes_at in self._places(address[lanes], width):
            if not memory.present[bytes_at].all():
                raise EmulatedError(f"uninitialised global memory of {memory.name} read")
            result[lanes[which]] = memory.data[bytes_at]
        return result

    def write(self, address: Array, values: Array, flag: Array) -> None:
        lanes = numpy.flatnonzero(flag)
        for memory, which, bytes_at in self._places(address[lanes], values.shape[1]):
            if len(numpy.unique(bytes_at)) != bytes_at.size:
                raise EmulatedError(f"two threads write one place of {memory.name}")
            memory.data[bytes_at] = values[lanes[which]]
            memory.present[bytes_at] = True

    # Shared memory.

    def _shared_places(self, address: Array, width: int, lanes: Array) -> Array:
        first = address[lanes].astype(numpy.int64)
        if numpy.any(first % width):
            raise EmulatedError(f"misaligned shared access of {width} bytes")
        if numpy.any(first + width > len(self.shared)):
            raise EmulatedError(f"shared access beyond {len(self.shared)} bytes")
        return first[:, None] + numpy.arange(width)

    def _own(self, places: Array, lanes: Array, why: str) -> None:
        """Note that these lanes write these bytes; a race where another thread touched them since the last barrier."""
        who = numpy.broadcast_to(self.numbers[lanes][:, None], places.shape)
        if len(numpy.unique(places)) != places.size:
            raise EmulatedError(f"race: two threads {why} one byte of shared memory at once")
        for touched in (self.writer[places], self.reader[places]):
            if numpy.any((touched != _NOBODY) & (touched != who)):
                raise EmulatedError(f"race: shared memory to {why} was used by another thread since the last barrier")
        self.writer[places] = who

    def load(self, address: Array, width: int) -> Array:
        lanes = self.numbers
        places = self._shared_places(address, width, lanes)
        if not self.present[places].all():
            raise EmulatedError("uninitialised shared memory read")
        who = numpy.broadcast_to(lanes[:, None], places.shape)
        written = self.writer[places]
        if numpy.any((written != _NOBODY) & (written != who)):
            raise EmulatedError("race: shared memory read that another thread wrote since the last barrier")
        flat, readers = places.reshape(-1), who.reshape(-1)
        order = numpy.argsort(flat, kind="stable")
        flat, readers = flat[order], readers[order]
        first = numpy.concatenate(([True], flat[1:] != flat[:-1]))
        starts = numpy.flatnonzero(first)
        alone = numpy.minimum.reduceat(readers, starts) == numpy.maximum.reduceat(readers, starts)
        bytes_at, found = flat[starts], numpy.where(alone, readers[starts], _SEVERAL)
        before = self.reader[bytes_at]
        self.reader[bytes_at] = numpy.where((before == _NOBODY) | (before == found), found, _SEVERAL)
        return self.shared[places]

    def store(self, address: Array, values: Array, flag: Array) -> None:
        lanes = numpy.flatnonzero(flag)
        places = self._shared_places(address, values.shape[1], lanes)
        self._own(places, lanes, "write")
        self.shared[places] = values[lanes]
        self.present[places] = True
        self._not_fenced(places)

    def barrier(self) -> None:
        self.writer[:] = _NOBODY
        self.reader[:] = _NOBODY
        self.seen |= self.fenced

    def _not_fenced(self, places: Array) -> None:
        self.fenced[places] = self.seen[places] = False

    # Asynchronous copies.

    def copy(self, target: Array, source: Array, flag: Array) -> None:
        lanes = numpy.flatnonzero(flag)
        places = self._shared_places(target, 16, lanes)
        self._own(places, lanes, "copy to")
        self.present[places] = False
        self._places(source[lanes], 16)  # faults show where they are made
        self.copies[-1].append((places, source.copy(), flag.copy()))

    def fence(self) -> None:
        """What each thread has written is seen by wgmma, from the next barrier on."""
        self.fenced |= self.present

    def core_matrices(self, start: int, along: int, across: int) -> Array:
        """(128 rows, 32 bytes) as wgmma reads them: core matrices of 8 rows x 16 bytes, so many bytes apart."""
        row, byte = numpy.arange(128)[:, None], numpy.arange(32)[None]
        places = start + row // 8 * across + row % 8 * 16 + byte // 16 * along + byte % 16
        if places.max() >= len(self.shared):
            raise EmulatedError(f"shared access beyond {len(self.shared)} bytes")
        if not self.present[places].all():
            raise EmulatedError("uninitialised shared memory read")
        if not self.seen[places].all():
            raise EmulatedError("wgmma reads shared memory that was written after the last fence and barrier")
        if numpy.any(self.writer[places] != _NOBODY):
            raise EmulatedError("race: shared memory read that another thread wrote since the last barrier")
        self.reader[places] = _SEVERAL
        found: Array = self.shared[places]
        return found

    def commit(self) -> None:
        self.copies.append([])

    def wait(self, pending: int) -> None:
        """All but the last `pending` committed groups are complete, for the thread that copied: others need a barrier
        after this.
        """
        complete, self.copies = self.copies[: len(self.copies) - 1 - pending], self.copies[-1 - pending :]
        for group in complete:
            for places, source, flag in group:
                lanes = numpy.flatnonzero(flag)
                self.shared[places] = self.read(source, 16, flag)[lanes]
                self.present[places] = True
                self.writer[places] = lanes[:, None]
                self._not_fenced(places)
