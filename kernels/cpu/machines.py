"""The machines that the inner loops are written for, and which of them this processor is.

A machine says how wide its vectors are, how it sums products of bytes (dot.py), and what a function's code must be
allowed to use. Machines differ in speed alone: integer sums are exact and the floating point operations are the same.

Which one a processor is, is asked at first use. LLVM tells the instruction sets of x86; on Arm it may not, so that
there the operating system is asked, and the functions of that machine carry the instruction set with them.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import attrs
import numba
from numba.core import codegen as numba_codegen

from .dot import Dot, MultiplyAddBytes, MultiplyAddPairs, SignedDot, Vpdpbusd

codegen: Any = numba_codegen
"""numba.core.codegen, which has no annotations."""


@attrs.frozen
class Machine:
    """How a processor's vectors are used: `lanes` 32-bit lanes, and the class of their products.

    `tokens` are the sizes of its micro-tiles, see tile.py: the sums of the largest, 32 / lanes vectors a token, stay in
    registers. `function_features` are LLVM's names of what the products need beyond what LLVM finds out by itself.
    """

    name: str
    lanes: int
    dot: type[Dot]
    tokens: tuple[int, ...]
    function_features: str = ""


VNNI512 = Machine("avx512-vnni", 16, Vpdpbusd, (8, 2, 1))
VNNI256 = Machine("avx-vnni", 8, Vpdpbusd, (2, 1))
AVX2 = Machine("avx2", 8, MultiplyAddBytes, (2, 1))
DOTPROD = Machine("neon-dotprod", 4, SignedDot, (3, 1), "+neon,+dotprod")
PORTABLE = Machine("portable", 8, MultiplyAddPairs, (2, 1))

MACHINES = (VNNI512, VNNI256, AVX2, DOTPROD, PORTABLE)
"""Fastest first."""

_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20
"""getauxval's question for a processor's abilities on Linux, and its bit for products of bytes on Arm."""


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets that Numba compiles for: those of this processor, unless Numba's settings say otherwise."""
    settings: Any = numba.config
    listed = settings.CPU_FEATURES
    # Numba's own list, which leaves out AVX where its settings say so.
    found = codegen.get_host_cpu_features() if listed is None else listed
    names = frozenset(each[1:] for each in found.split(",") if each.startswith("+"))
    return names | {"dotprod"} if listed is None and _has_dotprod() else names


def runs(machine: Machine) -> bool:
    """Whether this processor has the machine's instructions."""
    if machine is VNNI512:
        return features() >= {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}
    if machine is VNNI256:
        return "avxvnni" in features() or features() >= {"avx512vl", "avx512vnni"}
    if machine is AVX2:
        return "avx2" in features()
    if machine is DOTPROD:
        return "dotprod" in features()
    return True


@functools.cache
def machine(name: str | None = None) -> Machine:
    """The machine called `name`, or the fastest one that this processor has.

    Raises ValueError for one that it has not: LLVM would end the process.
    """
    there = [each for each in MACHINES if runs(each)]
    for each in there:
        if name in (None, each.name):
            return each
    raise ValueError(f"this processor has no machine {name!r}, but {', '.join(each.name for each in there)}")


def _has_dotprod() -> bool:
    """Whether this is a 64-bit Arm processor with sdot: every one of Apple's for computers, most others since 2018."""
    if platform.machine() not in ("aarch64", "arm64"):
        return False
    if sys.platform == "darwin":
        return True
    try:
        ask = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return False
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(ask(_HWCAP) & _HWCAP_ASIMDDP)
