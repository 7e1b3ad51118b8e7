"""Giving back memory that is a copy of a file: the checkpoint's tensors, once a layer has been repacked.

diffusers loads safetensors by mapping the file, and a packed layer's buffers are the mapped bytes themselves. After
repacking they are read again only to be saved, so their pages may go: the system drops those that are as in the file
and reads them back when they are touched (MADV_PAGEOUT, Linux 5.4). Pages that were written to, and memory that is no
file's, are left alone, so nothing can be lost; where the system knows no such advice nothing happens.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PAGEOUT = 21
_PAGE = 4096
"""Where the machine's pages are larger, unaligned advice is refused and nothing happens."""
_LEAST = _PAGE
"""Smaller tensors are not worth the call."""


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages of those tensors that lie in mapped files; what they hold stays the same."""
    large = [tensor for tensor in tensors if tensor.numel() * tensor.element_size() >= _LEAST]
    if not large or not sys.platform.startswith("linux"):
        return
    files = _mapped_files()
    starts = [start for start, _ in files]
    advise = ctypes.CDLL(None).madvise
    for tensor in large:
        first = tensor.data_ptr()
        last = first + tensor.numel() * tensor.element_size()
        index = bisect.bisect_right(starts, first) - 1
        if index >= 0 and last <= files[index][1]:
            first, last = first & -_PAGE, -(-last // _PAGE) * _PAGE
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)


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
