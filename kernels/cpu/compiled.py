"""Compiling at first use: which machine this processor is, and the addresses of compiled functions.

Nothing is compiled at import. A function is compiled when a layer first needs it, kept on disk by Numba (beside the
source, in NUMBA_CACHE_DIR, or in the user's cache folder), and then loaded in milliseconds by later processes. Numba
keys the file by the processor, so that a shared home is safe, but looks at the function's own module alone: a digest of
all modules here goes into the function's name, so that no code outlives a change of another.

A compilation that takes more than a second says so on stderr, once a process.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding

from . import float_panel, layer, products
from .tile import PORTABLE, VNNI256, VNNI512, Machine

_PRODUCTS: dict[str, dict[int, Callable[[Any], None]]] = {
    VNNI512.name: {4: products.vnni512_int4, 8: products.vnni512_int8},
    VNNI256.name: {4: products.vnni256_int4, 8: products.vnni256_int8},
    PORTABLE.name: {4: products.portable_int4, 8: products.portable_int8},
}
_FLOATS: dict[str, Callable[[Any], None]] = {VNNI512.name: products.vnni512_float}
_DECODERS: dict[tuple[str, int], Callable[[Any], None]] = {
    (VNNI512.name, 4): products.vnni512_decode4,
    (PORTABLE.name, 4): products.portable_decode4,
    (PORTABLE.name, 8): products.portable_decode8,
}
"""What a machine does not have, it takes from the portable one."""
MACHINES = (VNNI512, VNNI256, PORTABLE)
"""Fastest first."""

_ANNOUNCED_AFTER = 1.0
_LOCK = threading.RLock()
_ADDRESSES: dict[Callable[[Any], None], tuple[int, Any]] = {}
_announced = threading.Event()


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets that Numba compiles for: those of this processor, unless Numba's settings say otherwise."""
    settings: Any = numba.config
    named, listed = settings.CPU_NAME, settings.CPU_FEATURES
    if listed is not None:
        return frozenset(each[1:] for each in listed.split(",") if each.startswith("+"))
    if named not in (None, "", "host"):
        return frozenset()
    try:
        return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)
    except RuntimeError:  # LLVM cannot tell on this system
        return frozenset()


def runs(machine: Machine) -> bool:
    """Whether this processor has the machine's instructions."""
    if machine is VNNI512:
        return features() >= {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}
    if machine is VNNI256:
        return "avxvnni" in features() or features() >= {"avx512vl", "avx512vnni"}
    return True


@functools.cache
def machine(name: str | None = None) -> Machine:
    """The machine called `name`, or the fastest one that this processor has."""
    for each in MACHINES:
        if (name is None and runs(each)) or each.name == name:
            return each
    raise ValueError(f"no machine called {name!r}; there are {', '.join(each.name for each in MACHINES)}")


def product(machine: Machine, bits: int) -> int:
    """The address of the product of one panel of `bits`-wide weights, 4 or 8."""
    return _address(_PRODUCTS[machine.name][bits])


def float_product(machine: Machine) -> int:
    """The address of the float32 product of one panel."""
    return _address(_FLOATS.get(machine.name, products.portable_float))


def decoder(machine: Machine, bits: int, integers: bool) -> int:
    """The address of what decodes columns of a panel of `bits`-wide codes, 4 or 8, by table or as 8-bit integers."""
    if integers:
        return _address(products.decode_integers)
    return _address(_DECODERS.get((machine.name, bits)) or _DECODERS[PORTABLE.name, bits])


def float_run() -> int:
    """The address of `float_panel.run`."""
    return _address(float_panel.run)


def run() -> int:
    """The address of `layer.run`."""
    return _address(layer.run)


def _address(function: Callable[[Any], None]) -> int:
    with _LOCK:
        if function not in _ADDRESSES:
            compiled = _compile(function)
            _ADDRESSES[function] = (compiled.address, compiled)  # the object keeps the code alive
        return _ADDRESSES[function][0]


def _compile(function: Callable[[Any], None]) -> Any:
    """Numba's C callback of `function`, from the disk where it can be."""
    signature = numba.void(numba.int64)
    function.__qualname__ = f"{function.__name__}_{_digest()}"
    timer = threading.Timer(_ANNOUNCED_AFTER, _announce)
    timer.daemon = True
    timer.start()
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):  # no folder can be written: compile in every process
            raise
        return numba.cfunc(signature)(function)
    finally:
        timer.cancel()


@functools.cache
def _digest() -> str:
    """Eight letters that change with any module of this folder."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:8]


def _announce() -> None:
    if not _announced.is_set():
        _announced.set()
        print(
            "loraq: compiling the CPU kernels for this processor; this happens once, the code is kept on disk",
            file=sys.stderr,
            flush=True,
        )
