"""`rounding.searched` for integer formats as one pass over the matrix, compiled by Numba: the hot spot of every fit.

Reached through `loraq.rounding` alone, and imported by it at first use. It gives the codes and scales of
`rounding.searched_reference` bit for bit: no fastmath, so no multiply-add is fused and no sum reordered; rounding to
nearest even by adding and subtracting 1.5 * 2^23, exact below 2^22 and monotone above, where the clamp decides anyway.

How the loops are written follows from what the compiler turns into vector code (measured, AVX-512, int4, groups of 64):
ternaries instead of min and max (0.10 against 0.38 ns an element), one simple loop a step with a buffer of one group
between them instead of one loop with a sum (0.4 against 0.9 ns), and partial sums in lanes. The full search of nine
factors takes 4.4 ns an element; the torch reference takes 28.

The kernel releases the global lock, so layers that are fitted in Python threads really run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy
import torch

from loraq import rounding
from loraq.formats import IntegerFormat
from loraq.layer import Coded, groups_of

if TYPE_CHECKING:
    from torch import Tensor

Array = numpy.ndarray[Any, Any]

_NEAREST = numpy.float32(1.5 * 2**23)
_ZERO = numpy.float32(0)
_INFINITY = numpy.float32(numpy.inf)
_LANES = rounding.LANES
_NARROW = numpy.array(rounding.NEIGHBOURS, dtype=numpy.float32)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call; kept on disk unless no folder for that can be written."""
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@_compiled
def _bfloat16(value: Any) -> Any:
    """`value` (float32) rounded to bfloat16, ties to even, as float32."""
    bits = numpy.float32(value).view(numpy.uint32)
    odd = (bits >> numpy.uint32(16)) & numpy.uint32(1)
    bits = (bits + numpy.uint32(0x7FFF) + odd) & numpy.uint32(0xFFFF0000)
    return numpy.uint32(bits).view(numpy.float32)


@_compiled
def _lane_sum(terms: Array, lanes: Array) -> Any:
    """The sum of `terms` (a multiple of 16 long), in the order of `rounding.squared_error`."""
    for lane in range(_LANES):
        lanes[lane] = terms[lane]
    for chunk in range(_LANES, terms.size, _LANES):
        part = terms[chunk : chunk + _LANES]
        for lane in range(_LANES):
            lanes[lane] += part[lane]
    for lane in range(8):
        lanes[lane] += lanes[lane + 8]
    for lane in range(4):
        lanes[lane] += lanes[lane + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@_compiled
def _largest(values: Array, buffer: Array) -> Any:
    """The largest magnitude of `values`."""
    for column in range(values.size):
        buffer[column] = abs(values[column])
    largest = _ZERO
    for column in range(values.size):
        largest = buffer[column] if buffer[column] > largest else largest
    return largest


@_compiled
def _squares(values: Array, scale: Any, top: Any, squares: Array) -> None:
    """The squared rounding errors of one group at `scale`, into `squares`."""
    divisor = scale if scale > _ZERO else _INFINITY
    bottom = -top - numpy.float32(1)
    for column in range(values.size):
        value = values[column]
        code = (value / divisor + _NEAREST) - _NEAREST
        code = code if code < top else top
        code = code if code > bottom else bottom
        error = value - code * scale
        squares[column] = error * error


@_compiled
def _codes(values: Array, scale: Any, top: Any, codes: Array) -> None:
    """The codes of one group at `scale`, into `codes`."""
    divisor = scale if scale > _ZERO else _INFINITY
    bottom = -top - numpy.float32(1)
    for column in range(values.size):
        code = (values[column] / divisor + _NEAREST) - _NEAREST
        code = code if code < top else top
        code = code if code > bottom else bottom
        codes[column] = numpy.int8(code)


@_compiled
def _search(values: Array, group: int, top: Any, guessed: Array, factors: Array, codes: Array, scales: Array) -> None:
    """Codes (rows, columns) int8 and scales (rows, groups) float32 of `values`.

    Limits tried are `factors` times the top of the grid at the `guessed` scale, or where that is 0 times the group's
    largest magnitude; `guessed` has no rows where nothing is guessed.
    """
    rows, columns = values.shape
    squares = numpy.zeros((group + _LANES - 1) // _LANES * _LANES, numpy.float32)
    lanes = numpy.empty(_LANES, numpy.float32)
    for row in range(rows):
        for index in range(scales.shape[1]):
            first = index * group
            last = min(first + group, columns)
            part = values[row, first:last]
            start = guessed[row, index] * top if guessed.shape[0] > 0 else _ZERO
            if not start > _ZERO:
                start = _largest(part, squares)
            squares[part.size :] = _ZERO
            best, found = _INFINITY, _bfloat16(start / top)
            for factor in factors:
                scale = _bfloat16(start * factor / top)
                _squares(part, scale, top, squares)
                error = _lane_sum(squares, lanes)
                if error < best:
                    best, found = error, scale
            scales[row, index] = found
            _codes(part, found, top, codes[row, first:last])


def searched(values: Tensor, format: IntegerFormat, group: int, guess: Coded | None) -> Coded:
    """What `rounding.searched_reference` gives for float32 values on the CPU."""
    rows, columns = values.shape
    groups = groups_of(columns, group)
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, groups), dtype=torch.float32)
    guessed = torch.empty((0, groups), dtype=torch.float32) if guess is None else guess.scales.float()
    _search(
        values.detach().contiguous().numpy(),
        group,
        numpy.float32(format.limit),
        guessed.contiguous().numpy(),
        numpy.array(rounding.factors_for(format), dtype=numpy.float32) if guess is None else _NARROW,
        codes.numpy(),
        scales.numpy(),
    )
    return Coded(format, (rows, columns), group, {"codes": codes, "scales": scales.to(torch.bfloat16)})
