"""What one call of the compiled layer is told: C structures that Python fills and Numba reads through their address.

A structure is a flat run of int64 and float64 fields, so that one call passes one address, whichever thread makes it. A
`Layer` is filled once, when a layer is repacked, and points to its `Matrix` and `Rounding` structures; a `Call` is
filled for every call. Addresses of structures and tensors are kept alive by their Python owners.
"""

from __future__ import annotations

import ctypes

import numpy

_INT, _FLOAT = ctypes.c_int64, ctypes.c_double

FLOAT_ARGUMENTS_AT = 128
"""A worker's memory begins with the arguments of a product, and from here on those of float_panel.run."""
MEMORY_BEGINS = 256
"""The rest of a worker's memory begins here."""


class Matrix(ctypes.Structure):
    """A repacked weight (rows, columns): the compiled product of one panel, and where its panels are."""

    _fields_ = (
        ("product", _INT),  # address of the compiled function
        ("weights", _INT),
        ("scales", _INT),
        ("panels", _INT),
        ("panel_bytes", _INT),
        ("segments", _INT),
        ("slot", _INT),
    )


class FloatMatrix(ctypes.Structure):
    """A weight (rows, columns) that is multiplied in float32: panels of it, or of its codes, decoded when needed."""

    _fields_ = (
        ("run", _INT),  # address of float_panel.run
        ("product", _INT),  # of the compiled product
        ("panels", _INT),
        ("columns", _INT),
        ("weights", _INT),  # panels of float32; 0 where there are codes
        ("decoder", _INT),  # the rest is for codes: address of the compiled function
        ("codes", _INT),
        ("panel_bytes", _INT),
        ("values", _INT),
        ("scales", _INT),
        ("offsets", _INT),  # 0: none
        ("group", _INT),
        ("groups", _INT),
        ("chunk", _INT),  # columns that are decoded at a time
        ("panel_at", _INT),  # their place in a worker's memory
    )


class Rounding(ctypes.Structure):
    """How rows are rounded to codes, in the segments of the products that take them.

    `starts` and `groups_of` are int64 arrays: segment s is columns starts[s] to starts[s + 1], in group groups_of[s].
    `offset` and `second_offset` are 2^(bits - 1) of the weights: the products take Σ codes times -offset.
    """

    _fields_ = (
        ("columns", _INT),
        ("group", _INT),
        ("segments", _INT),
        ("slot", _INT),
        ("starts", _INT),
        ("groups_of", _INT),
        ("offset", _INT),
        ("second_offset", _INT),
        ("codes_at", _INT),  # the rest: places in a worker's memory
        ("scales_at", _INT),
        ("offsets_at", _INT),
        ("second_at", _INT),
        ("top", _FLOAT),
    )


class Layer(ctypes.Structure):
    """A repacked layer: addresses of its matrices and roundings (0: none), its transforms, a worker's memory."""

    _fields_ = (
        ("inn", _INT),
        ("out", _INT),
        ("main", _INT),
        ("down", _INT),
        ("up", _INT),
        ("float_main", _INT),  # in the place of the three above, for what is multiplied in float32
        ("float_down", _INT),
        ("float_up", _INT),
        ("round_main", _INT),
        ("round_down", _INT),  # the same as round_main where both take the same codes
        ("round_thin", _INT),
        ("smoothing", _INT),  # float32 (inn,) to divide by
        ("block", _INT),  # of the Hadamard rotation, 1 for none
        ("row_at", _INT),  # places in a worker's memory: of one transformed row
        ("row_stride", _INT),  # 0, or the bytes from one row to the next where a block's rows are kept
        ("part_at", _INT),
        ("limits_at", _INT),
        ("thin_at", _INT),
        ("tile_at", _INT),
        ("bias_at", _INT),
        ("factor", _FLOAT),  # of the Hadamard rotation
    )


class Call(ctypes.Structure):
    """One call: the tensors, how the work is cut, and the counters that workers draw their parts from."""

    _fields_ = (
        ("next_worker", _INT),  # the two counters come first: the kernel knows their places
        ("next_task", _INT),
        ("layer", _INT),
        ("input", _INT),
        ("output", _INT),
        ("bias", _INT),  # float32 (out,) or 0
        ("bfloat16_in", _INT),
        ("bfloat16_out", _INT),
        ("tokens", _INT),
        ("token_block", _INT),
        ("token_blocks", _INT),
        ("output_parts", _INT),
        ("memory", _INT),
        ("memory_stride", _INT),
    )


MATRIX, FLOAT_MATRIX, ROUNDING, LAYER, CALL = (
    numpy.dtype(kind) for kind in (Matrix, FloatMatrix, Rounding, Layer, Call)
)
