"""Advice to the system about memory: what may go, and what is about to be written.

The checkpoint's tensors may go once a layer has been repacked. diffusers loads safetensors by mapping the file, and a
packed layer's buffers are the mapped bytes themselves. After repacking they are read again only to be saved, so the
system drops those pages that are as in the file and reads them back when they are touched (MADV_PAGEOUT, Linux 5.4).
Pages that were written to, and memory that is no file's, are left alone, so nothing can be lost.

An output of more than 32 MB is mapped anew by the C library in each call, and its pages are made one by one as they are
first written: that took as long as the products. Of pages of 2 MB there are 512 times fewer (MADV_HUGEPAGE).

Where the system knows no such advice nothing happens.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_HUGEPAGE, _PAGEOUT = 14, 21
_PAGE = mmap.PAGESIZE
_LEAST = _PAGE
"""Smaller tensors are not worth the call."""
_MAPPED_ANEW = 32 * 2**20
"""The GNU C library keeps what is smaller in its heap (DEFAULT_MMAP_THRESHOLD_MAX)."""


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages of those tensors that lie in mapped files; what they hold stays the same."""
    large = [tensor for tensor in tensors if tensor.numel() * tensor.element_size() >= _LEAST]
    if not large or not sys.platform.startswith("linux"):
        return
    files = _mapped_files()
    starts = [start for start, _ in files]
    for tensor in large:
        first = tensor.data_ptr()
        last = first + tensor.numel() * tensor.element_size()
        index = bisect.bisect_right(starts, first) - 1
        if index >= 0 and last <= files[index][1]:
            _advise(first & -_PAGE, -(-last // _PAGE) * _PAGE, _PAGEOUT)


def expect(output: Tensor) -> None:
    """Have the memory of a new tensor that will be written to as a whole in large pages, if it is large."""
    size = output.numel() * output.element_size()
    if size >= _MAPPED_ANEW and sys.platform.startswith("linux"):
        first = output.data_ptr()
        _advise(-(-first // _PAGE) * _PAGE, first + size & -_PAGE, _HUGEPAGE)


def _advise(first: int, last: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _mapped_files() -> list[tuple[int, int]]:
    """The ranges of addresses, ascending, in which this process has mapped files."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, _, _, node, *_ = line.split(maxsplit=5)
        if node != "0":  # memory of its own has no inode
            start, end = (int(each, 16) for each in addresses.split("-"))
            found.append((start, end))
    return found
