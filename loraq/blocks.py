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
"""As many elements a block has at most, unless a row alone has more."""


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a matrix (rows, columns), in order."""
    rows, columns = matrix.shape
    step = max(1, _ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def by_rows(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """`function(matrix)` for a function of (rows, columns) that treats every row alone: row k of the result is its."""
    blocks = list(row_blocks(matrix))
    if len(blocks) < 2:
        return function(matrix)
    first = function(matrix[blocks[0]])
    result = torch.empty((len(matrix), *first.shape[1:]), dtype=first.dtype, device=first.device)
    result[blocks[0]] = first
    for block in blocks[1:]:
        result[block] = function(matrix[block])
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
