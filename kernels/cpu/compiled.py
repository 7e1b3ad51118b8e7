"""Compiling at first use: the addresses of compiled functions.

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

from . import float_panel, layer, products
from .float_repack import Decoding
from .machines import AVX2, DOTPROD, PORTABLE, VNNI256, VNNI512, Machine

_PRODUCTS: dict[str, dict[int, Callable[[Any], None]]] = {
    VNNI512.name: {4: products.vnni512_int4, 8: products.vnni512_int8},
    VNNI256.name: {4: products.vnni256_int4, 8: products.vnni256_int8},
    AVX2.name: {4: products.avx2_int4, 8: products.portable_int8},
    DOTPROD.name: {4: products.dotprod_int4, 8: products.dotprod_int8},
    PORTABLE.name: {4: products.portable_int4, 8: products.portable_int8},
}
_FLOATS: dict[str, Callable[[Any], None]] = {VNNI512.name: products.vnni512_float}
_DECODERS: dict[str, dict[Decoding, Callable[[Any], None]]] = {
    VNNI512.name: {"table of 16": products.permuted_floats, "table of 256 bfloat16": products.permuted_halves},
    VNNI256.name: {"table of 16": products.permuted_twice},
    AVX2.name: {"table of 16": products.permuted_twice},
    DOTPROD.name: {"table of 16": products.table_bytes},
    PORTABLE.name: {
        "integers": products.integers,
        "table of 16": products.loads4,
        "table of 256": products.loads,
        "table of 256 bfloat16": products.loads,
    },
}
"""What decodes codes. What a machine does not have, it takes from the portable one."""

_ANNOUNCED_AFTER = 1.0
_LOCK = threading.RLock()
_ADDRESSES: dict[Callable[[Any], None], tuple[int, Any]] = {}
_announced = threading.Event()


def product(machine: Machine, bits: int) -> int:
    """The address of the product of one panel of `bits`-wide weights, 4 or 8."""
    return _address(_PRODUCTS[machine.name][bits])


def float_product(machine: Machine) -> int:
    """The address of the float32 product of one panel."""
    return _address(_FLOATS.get(machine.name, products.portable_float))


def decoder(machine: Machine, decoding: Decoding) -> int:
    """The address of what decodes columns of a panel of codes."""
    return _address(_DECODERS[machine.name].get(decoding) or _DECODERS[PORTABLE.name][decoding])


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
