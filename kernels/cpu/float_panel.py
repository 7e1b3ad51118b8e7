"""One panel of a product in float32, compiled apart from layer.py as most layers never need it.

A matrix that is held in codes is decoded a run of columns at a time into the worker's memory, where it stays in the
cache while the tokens of the block are multiplied with it.
"""

from __future__ import annotations

from typing import Any

import numpy
from numba import carray  # type: ignore[attr-defined]  # it is there, but not in __all__

from .memory import call, pointer
from .records import FLOAT_MATRIX
from .tile import OUTPUTS

ARGUMENTS = (
    "matrix",
    "rows",
    "row_stride",
    "memory",
    "panel",
    "bias",
    "zeros",
    "target",
    "stride",
    "add",
    "tokens",
)
"""What `run` takes, int64 one after the other in memory: a records.FloatMatrix, the rows in float32, `row_stride`
bytes apart, and where the panel goes. `bias` and `zeros` are 32 float32 each."""


def run(address: Any) -> None:
    """Multiply a block's rows with one panel: called with the address of ARGUMENTS."""
    wanted = carray(pointer(address), (11,), numpy.int64)
    matrix = carray(pointer(wanted[0]), (1,), FLOAT_MATRIX)[0]
    memory, panel = wanted[3], wanted[4]
    given = carray(pointer(memory), (12,), numpy.int64)  # the arguments of the decoder and then of the product
    first = 0
    while first < matrix.columns:
        count = matrix.columns
        weights = matrix.weights + panel * matrix.columns * OUTPUTS * 4
        if matrix.decoder != 0:
            count = min(matrix.chunk, matrix.columns - first)
            weights = memory + matrix.panel_at
            given[0] = matrix.codes + panel * matrix.panel_bytes
            given[1] = matrix.values
            given[2] = matrix.scales + panel * matrix.groups * OUTPUTS * 4
            given[3] = 0
            if matrix.offsets != 0:
                given[3] = matrix.offsets + panel * matrix.groups * OUTPUTS * 4
            given[4] = weights
            given[5] = first
            given[6] = count
            given[7] = matrix.group
            call(matrix.decoder, memory)
        given[0] = wanted[1] + first * 4
        given[1] = wanted[2]
        given[2] = count
        given[3] = weights
        given[4] = wanted[5] if first + count == matrix.columns else wanted[6]
        given[5] = wanted[7]
        given[6] = wanted[8]
        given[7] = 1 if first > 0 else wanted[9]
        given[8] = wanted[10]
        call(matrix.product, memory)
        first += count
