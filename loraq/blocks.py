"""Large matrices a few rows at a time: what an operation makes on its way then takes megabytes, not multiples.

A fit's memory is a few matrices of the layer's size; a chain of elementwise operations over whole matrices, or a sum in
float64, would double that for moments. Rows are taken in blocks that stay in a processor's cache, which is no slower.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_ELEMENTS = 2**18
"""As many elements a block has at most, unless a row alone has more: a MiB of float32, which a core's cache holds."""
_ELEMENTS_ELSEWHERE = 2**24
"""The same off the CPU, where each operation takes its time to launch."""
_PICKED = 256
"""Rows that are picked from a matrix at a time."""


def row_blocks(matrix: Tensor, copies: int = 1) -> Iterator[slice]:
    """Slices that cover the rows of a matrix (rows, columns), in order; shorter ones for `copies` at once."""
    rows, columns = matrix.shape
    elements = _ELEMENTS if matrix.device.type in ("cpu", "meta") else _ELEMENTS_ELSEWHERE
    step = max(1, elements // max(1, columns * copies))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pieces(rows: Tensor) -> Iterator[Tensor]:
    """The indices `rows` (n,), some at a time: picking rows of a matrix copies them."""
    for start in range(0, len(rows), _PICKED):
        yield rows[start : start + _PICKED]


def by_rows(function: Callable[..., Tensor], matrix: Tensor, *others: Tensor) -> Tensor:
    """`function(matrix, *others)` for a function that treats every row alone: row k of the result is of their rows k.

    All have as many rows; `matrix` (rows, columns), the widest, says how many are taken at a time.
    """
    blocks = list(row_blocks(matrix))
    if len(blocks) < 2:
        return function(matrix, *others)
    first = function(*(each[blocks[0]] for each in (matrix, *others)))
    result = torch.empty((len(matrix), *first.shape[1:]), dtype=first.dtype, device=first.device)
    result[blocks[0]] = first
    for block in blocks[1:]:
        result[block] = function(*(each[block] for each in (matrix, *others)))
    return result


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    It keeps what lies between small tensors that live on, a heap for each thread: half a GiB after a hundred layers.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def norm(matrix: Tensor, other: Tensor | None = None) -> float:
    """The Frobenius norm of a matrix (rows, columns), or of its difference to `other`, summed in float64."""
    total = 0.0
    for block in row_blocks(matrix):
        values = matrix[block] if other is None else matrix[block] - other[block]
        total = math.hypot(total, float(torch.linalg.vector_norm(values.double())))
    return total
