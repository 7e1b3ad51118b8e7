"""The compiled products and decoders, one function a machine and width, called with the address of their arguments.

Plain functions of this module, so that Numba can keep their compiled code on disk; compiled.py compiles them when they
are first called for.
"""

from __future__ import annotations

from typing import Any

from .code_values import Integers, Loads, Loads4, PermutedFloats, PermutedHalves, PermutedTwice, TableBytes
from .decode import decoder
from .float_tile import float_panel
from .machines import AVX2, DOTPROD, PORTABLE, VNNI256, VNNI512
from .tile import panel

_VNNI512_INT4, _VNNI512_INT8 = panel(VNNI512, 4), panel(VNNI512, 8)
_VNNI256_INT4, _VNNI256_INT8 = panel(VNNI256, 4), panel(VNNI256, 8)
_AVX2_INT4 = panel(AVX2, 4)
_DOTPROD_INT4, _DOTPROD_INT8 = panel(DOTPROD, 4), panel(DOTPROD, 8)
_PORTABLE_INT4, _PORTABLE_INT8 = panel(PORTABLE, 4), panel(PORTABLE, 8)

_VNNI512_FLOAT, _PORTABLE_FLOAT = float_panel(VNNI512, 8, 2, 1), float_panel(PORTABLE, 3, 1)
_PERMUTED_FLOATS, _PERMUTED_HALVES, _PERMUTED_TWICE = (
    decoder(kind) for kind in (PermutedFloats, PermutedHalves, PermutedTwice)
)
_TABLE_BYTES, _LOADS4, _LOADS, _INTEGERS = (decoder(kind) for kind in (TableBytes, Loads4, Loads, Integers))


def vnni512_int4(arguments: Any) -> None:
    """512-bit vpdpbusd, 4-bit weights."""
    _VNNI512_INT4(arguments)


def vnni512_int8(arguments: Any) -> None:
    """512-bit vpdpbusd, 8-bit weights."""
    _VNNI512_INT8(arguments)


def vnni256_int4(arguments: Any) -> None:
    """256-bit vpdpbusd, 4-bit weights."""
    _VNNI256_INT4(arguments)


def vnni256_int8(arguments: Any) -> None:
    """256-bit vpdpbusd, 8-bit weights."""
    _VNNI256_INT8(arguments)


def avx2_int4(arguments: Any) -> None:
    """256-bit vpmaddubsw, 4-bit weights."""
    _AVX2_INT4(arguments)


def dotprod_int4(arguments: Any) -> None:
    """Arm's sdot, 4-bit weights."""
    _DOTPROD_INT4(arguments)


def dotprod_int8(arguments: Any) -> None:
    """Arm's sdot, 8-bit weights."""
    _DOTPROD_INT8(arguments)


def portable_int4(arguments: Any) -> None:
    """Any processor, 4-bit weights."""
    _PORTABLE_INT4(arguments)


def portable_int8(arguments: Any) -> None:
    """Any processor, 8-bit weights."""
    _PORTABLE_INT8(arguments)


def vnni512_float(arguments: Any) -> None:
    """512-bit float32."""
    _VNNI512_FLOAT(arguments)


def portable_float(arguments: Any) -> None:
    """Any processor, float32."""
    _PORTABLE_FLOAT(arguments)


def permuted_floats(arguments: Any) -> None:
    """Codes of 4 bits, AVX-512."""
    _PERMUTED_FLOATS(arguments)


def permuted_halves(arguments: Any) -> None:
    """Codes of 8 bits whose values are exact in bfloat16, AVX-512."""
    _PERMUTED_HALVES(arguments)


def permuted_twice(arguments: Any) -> None:
    """Codes of 4 bits, AVX2."""
    _PERMUTED_TWICE(arguments)


def table_bytes(arguments: Any) -> None:
    """Codes of 4 bits, Arm."""
    _TABLE_BYTES(arguments)


def loads4(arguments: Any) -> None:
    """Codes of 4 bits, any processor."""
    _LOADS4(arguments)


def loads(arguments: Any) -> None:
    """Codes of 8 bits, any processor."""
    _LOADS(arguments)


def integers(arguments: Any) -> None:
    """Integers of 8 bits, any processor."""
    _INTEGERS(arguments)
