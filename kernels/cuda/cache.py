"""Cubins on disk: a program is compiled once for an architecture, by whichever process needs it first.

A file is called PROGRAM.sm_ARCHITECTURE.SOURCE.TOOLS.cubin: SOURCE changes with the kernels' source, TOOLS with the
versions of the compiler. It lies in LORAQ_CUDA_CACHE, else in loraq/cuda below the user's cache folder. A folder made
by `python -m loraq.kernels.cuda.build` and named by LORAQ_CUDA_PREBUILT is looked into first; with it, no compiler need
be installed. Compiling for more than a second says so on stderr, once a process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import tempfile
import threading
from pathlib import Path

from . import toolchain
from .hopper import Hopper
from .program import AbstractProgram, name

_ANNOUNCED_AFTER = 1.0
_LOCK = threading.Lock()
_announced = threading.Event()
_NOT_CODE = (
    "backend",
    "build",
    "cache",
    "driver",
    "emulated",
    "emulated_memory",
    "emulator",
    "first_use",
    "runner",
    "simulator",
)
"""Modules that no cubin depends on."""


class NoCubinError(RuntimeError):
    """A kernel is neither on disk nor can be compiled; the message says what would do."""


def entry(program: AbstractProgram) -> str:
    """The name of a program's function in its cubin."""
    return re.sub(r"\W", "_", name(program))


@functools.cache
def source_digest() -> str:
    """Ten letters that change with the source of the kernels."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        if module.stem not in _NOT_CODE:
            digest.update(module.read_bytes())
    return digest.hexdigest()[:10]


@functools.cache
def _tools() -> str | None:
    """Six letters for the compiler's versions, None where it is not installed."""
    if toolchain.missing() is not None:
        return None
    return hashlib.sha256(toolchain.version().encode()).hexdigest()[:6]


def folder() -> Path:
    """Where cubins are kept."""
    named = os.environ.get("LORAQ_CUDA_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loraq" / "cuda"


def code_for(program: AbstractProgram, architecture: str) -> str:
    """Which code of a program a GPU of this architecture runs: what uses Hopper's own instructions is for it alone."""
    return "90a" if isinstance(program, Hopper) else architecture.rstrip("a")


def prebuilt() -> str | None:
    """The folder of cubins that were built beforehand."""
    return os.environ.get("LORAQ_CUDA_PREBUILT") or None


def usable() -> str | None:
    """None where kernels can be had, compiled or prebuilt, else a sentence that says what to install."""
    return toolchain.missing() if prebuilt() is None else None


def cubin(program: AbstractProgram, architecture: str) -> bytes:
    """The program's code. Raises NoCubinError where it is not on disk and cannot be compiled."""
    stem = f"{name(program)}.sm_{architecture}.{source_digest()}"
    beforehand = prebuilt()
    with _LOCK:
        for found in sorted(Path(beforehand).glob(f"{stem}.*.cubin")) if beforehand else ():
            return found.read_bytes()
        tools = _tools()
        if tools is None:
            raise NoCubinError(_lacking(stem, beforehand))
        path = folder() / f"{stem}.{tools}.cubin"
        try:
            return path.read_bytes()
        except OSError:
            pass
        return build(program, architecture, path)


def _lacking(stem: str, beforehand: str | None) -> str:
    why = toolchain.missing()
    if beforehand is None:
        return str(why)
    return (
        f"LORAQ_CUDA_PREBUILT={beforehand} has no '{stem}.*.cubin', so it is of another version, machine or layer, "
        f"and {why}"
    )


def build(program: AbstractProgram, architecture: str, path: Path | None = None) -> bytes:
    """Compile a program and write it to `path`, or into the cache where that is None."""
    if path is None:
        path = folder() / file_name(program, architecture)
    timer = threading.Timer(_ANNOUNCED_AFTER, _announce)
    timer.daemon = True
    timer.start()
    try:
        code = toolchain.build(program, architecture).code
    finally:
        timer.cancel()
    _write(path, code)
    return code


def file_name(program: AbstractProgram, architecture: str) -> str:
    """The name of the file that a program is kept in, for the compiler that is installed."""
    return f"{name(program)}.sm_{architecture}.{source_digest()}.{_tools()}.cubin"


def _write(path: Path, code: bytes) -> None:
    """Whole or not at all; a folder that cannot be written costs a compilation in every process, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        return


def _announce() -> None:
    if not _announced.is_set():
        _announced.set()
        print(
            "loraq: compiling the CUDA kernels for this GPU; this happens once, the code is kept on disk",
            file=sys.stderr,
            flush=True,
        )
