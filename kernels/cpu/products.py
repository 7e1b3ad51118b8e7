"""The compiled products and decoders, one function a machine and width, called with the address of their arguments.

Plain functions of this module, so that Numba can keep their compiled code on disk; compiled.py compiles them when they
are first called for. The integer sums of a micro-tile stay in registers, 32 / lanes vectors a token, while its totals
may go to the stack once a segment: 8 tokens were measured to be fastest for AVX-512 (docs/notes/cpu-kernels.md).
"""

from __future__ import annotations

from typing import Any

from .decode import decoder
from .float_tile import float_panel
from .tile import PORTABLE, VNNI256, VNNI512, panel

_VNNI512_INT4, _VNNI512_INT8 = panel(VNNI512, 4, 8, 2, 1), panel(VNNI512, 8, 8, 2, 1)
_VNNI256_INT4, _VNNI256_INT8 = panel(VNNI256, 4, 2, 1), panel(VNNI256, 8, 2, 1)
_PORTABLE_INT4, _PORTABLE_INT8 = panel(PORTABLE, 4, 2, 1), panel(PORTABLE, 8, 2, 1)

_VNNI512_FLOAT, _PORTABLE_FLOAT = float_panel(VNNI512, 8, 2, 1), float_panel(PORTABLE, 3, 1)
_VNNI512_DECODE4 = decoder(VNNI512, 4)
_PORTABLE_DECODE4, _PORTABLE_DECODE8 = decoder(PORTABLE, 4), decoder(PORTABLE, 8)
_DECODE_INTEGERS = decoder(PORTABLE, 8, integers=True)


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


def vnni512_decode4(arguments: Any) -> None:
    """Codes of 4 bits, their table in a register."""
    _VNNI512_DECODE4(arguments)


def portable_decode4(arguments: Any) -> None:
    """Codes of 4 bits, any processor."""
    _PORTABLE_DECODE4(arguments)


def portable_decode8(arguments: Any) -> None:
    """Codes of 8 bits, any processor."""
    _PORTABLE_DECODE8(arguments)


def decode_integers(arguments: Any) -> None:
    """Integers of 8 bits, any processor."""
    _DECODE_INTEGERS(arguments)
