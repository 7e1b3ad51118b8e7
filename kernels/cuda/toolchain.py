"""From a program to a cubin: Numba makes PTX, nvJitLink assembles it. Neither needs a GPU or a driver.

`build` is the whole way; `missing` says in a sentence which package it lacks. Numba's own caches and linker are left
aside, because they ask the driver for the device. The compiler is CUDA 13.0's (`loraq[cuda]`) or 12.8's
(`loraq[cuda12]`, for older drivers): what it makes runs with any driver of its own major version or a later one.
"""

# mypy: disable-error-code="attr-defined, import-not-found"
# The compiler's packages need not be installed.

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from typing import Any

import attrs

from .program import AbstractProgram, name

ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")
"""What kernels are built and tested for: compute capability without the point."""


def install() -> str:
    """The command that brings a compiler: of the same CUDA as torch, whose libraries it shares."""
    from torch import version

    return f"pip install 'loraq[{'cuda12' if str(version.cuda).startswith('12.') else 'cuda'}]'"


@attrs.frozen
class Built:
    """A program for one architecture: its code, what the assembler says of it, and the PTX it came from."""

    name: str
    architecture: str
    entry: str
    code: bytes = attrs.field(repr=False)
    registers: int
    stack_bytes: int
    spilled_bytes: int
    ptx: str = attrs.field(repr=False)


def missing() -> str | None:
    """None where kernels can be compiled, else one sentence that says what to install."""
    for module, package in (
        ("numba_cuda", "numba-cuda"),
        ("cuda.core", "cuda-core"),
        ("cuda.bindings", "cuda-bindings"),
    ):
        if not found(module):
            return f"the CUDA kernels need the package {package} to be compiled; {install()} brings it"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for library in ("nvvm", "nvrtc", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(library)
        except DynamicLibNotFoundError:
            return f"the CUDA kernels need NVIDIA's library {library} to be compiled; {install()} brings it"
    from numba import cuda

    if getattr(cuda, "implementation", "") != "NVIDIA":
        return f"Numba's own CUDA target hides numba-cuda, which the kernels need; {install()} into one environment"
    return None


def found(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def version() -> str:
    """The versions that a cubin depends on."""
    from importlib import metadata

    packages = ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12")
    there = {each: _version_of(each, metadata) for each in packages}
    return " ".join(f"{package} {number}" for package, number in there.items() if number) + f" CUDA {major()}"


def _version_of(package: str, metadata: Any) -> str | None:
    try:
        return str(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def major() -> int:
    """The major version of CUDA that the assembler belongs to, and at least which a driver must be of. `missing` must
    be None.
    """
    from cuda.bindings import nvjitlink

    return int(nvjitlink.version()[0])


@functools.lru_cache(maxsize=64)
def ptx(program: AbstractProgram, generation: str) -> str:
    """The program's PTX for a generation: "80" for all that later ones run as well, "90a" for what they do not."""
    from numba import cuda, types

    kinds = {"U": types.uint64, "s": types.int32}
    signature = types.void(*(kinds[letter] for letter in program.operands))
    capability: tuple[Any, ...] = (int(generation[0]), int(generation[1]), *generation[2:])
    machine = importlib.import_module(".ptx", __package__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text, _ = cuda.compile(
            program.make(machine),
            signature,
            device=False,
            abi="numba",
            cc=capability,
            output="ptx",
            launch_bounds=(program.threads, program.resident),
        )
    return str(text)


def build(program: AbstractProgram, architecture: str) -> Built:
    """Compile and assemble a program."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    text = ptx(program, architecture if architecture.endswith("a") else "80")
    heading = re.search(r"\.entry (\S+)\(", text)
    assert heading is not None, "Numba's PTX has one entry"
    entry = re.sub(r"\W", "_", name(program))  # instead of Numba's mangled one
    text = text.replace(heading[1], entry)
    options = LinkerOptions(arch=f"sm_{architecture}", ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    code = bytes(linker.link("cubin").code)
    log = f"{linker.get_info_log()}\n{linker.get_error_log()}"
    return Built(
        name=name(program),
        architecture=architecture,
        entry=entry,
        code=code,
        registers=_figure(r"Used (\d+) registers", log),
        stack_bytes=_figure(r"(\d+) bytes stack frame", log),
        spilled_bytes=_figure(r"(\d+) bytes spill stores", log),
        ptx=text,
    )


def _figure(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"the assembler's report says nothing of '{pattern}': {log.strip()}")
    return int(found[1])
