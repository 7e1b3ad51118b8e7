"""What the CUDA kernels come to as machine code, without a GPU: registers, shared memory, instructions of inner loops.

    python benchmarks/gpu_code.py                         the table of docs/notes/cuda-kernels.md
    python benchmarks/gpu_code.py --kernel matmul --arch 90

Needs `loraq[cuda]` and NVIDIA's disassembler (`pip install nvidia-cuda-nvdisasm`, or nvdisasm on the path). Counted is
the longest loop of a kernel in its SASS, once each instruction, whether or not a pass runs through it: some copies and
the last groups are branched around. A warp issues one instruction a clock at best, so `instructions` of a loop, for so
many outputs of a warp and 64 columns, is a bound on speed as the tensor cores' rate is; it is no measurement of time.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

toolchain, matmul, hopper, quantizer, skinny, thin, plain = (
    importlib.import_module(f"loraq.kernels.cuda.{name}")
    for name in ("toolchain", "matmul", "hopper", "quantizer", "skinny", "thin", "plain")
)

ARCHITECTURES = ("80", "86", "90", "90a", "120")
_END: dict[str, Any] = {"bias": True, "output": "bfloat16", "aligned": True}
_ROUNDED: dict[str, Any] = {"input": "bfloat16", "aligned": True, "factors": "none", "block": 1, "top": 127}
_ROUNDED |= {"native": False, "whole": False, "rank_groups": 0, "branch_top": 127}
_ROUNDED |= {"branch_whole": False, "thin_whole": False}


@attrs.frozen
class Kernel:
    """A kernel by name; what a warp's loop makes in one pass; and where it runs."""

    name: str
    program: Any
    makes: str
    architectures: tuple[str, ...] = ("80", "90", "120")


def kernels() -> list[Kernel]:
    """The rows of the table."""

    def product(**changes: Any) -> Any:
        return matmul.Matmul(**({"weight_bits": 4, "native": False, "branch": False} | _END | changes))

    def rounded(**changes: Any) -> Any:
        return quantizer.Quantizer(**(_ROUNDED | changes))

    rotated = {"factors": "multiply", "block": 128}
    small, large = "32 x 32", "64 x 32"
    return [
        Kernel("matmul W4A8", product(), small),
        Kernel("matmul W4A8, branch", product(branch=True), small),
        Kernel("matmul W4A8, wide warps", product(wide=True), large, ("80", "90")),
        Kernel("matmul W4A8, wide warps, branch", product(wide=True, branch=True), large, ("80", "90")),
        Kernel("matmul W4A8, groups of 128", product(span=2), small + " x 2"),
        Kernel("matmul W4A4, native", product(native=True), small, ("80", "86")),
        Kernel("matmul W4A4, native, wide warps", product(native=True, wide=True), large, ("80",)),
        Kernel("matmul int4x2", product(integers=True), small),
        Kernel("hopper int4x2", hopper.Hopper(integers=True, branch=False, **_END), "128 x 16", ("90a",)),
        Kernel("hopper W4A8", hopper.Hopper(integers=False, branch=False, **_END), "128 x 16", ("90a",)),
        Kernel("quantizer int8", rounded(), "16 x 128"),
        Kernel("quantizer int8, rotated", rounded(**rotated), "16 x 128"),
        Kernel("quantizer int8, rotated, rank 64", rounded(**rotated, rank_groups=1), "16 x 128"),
        Kernel("quantizer int4, rotated, rank 128", rounded(**rotated, top=7, rank_groups=2), "16 x 128"),
        Kernel("skinny W4A8, branch", skinny.Skinny(4, False, True, True, "bfloat16"), "16 x 16 x 2"),
        Kernel("thin", thin.Thin(2, 127, False), ""),
        Kernel("plain", plain.Plain(8, 4), ""),
    ]


def disassembler() -> str | None:
    """The path of nvdisasm."""
    found = [*(Path(sys.prefix) / "lib").glob("python*/site-packages/nvidia/*/bin/nvdisasm")]
    return str(found[0]) if found else shutil.which("nvdisasm")


def instructions(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """A disassembly's instructions, (name, line) each, and where its labels are among them."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found.append((code[1], line))
    return found, labels


def loops(text: str) -> Iterator[list[str]]:
    """The names of the instructions of each loop."""
    found, labels = instructions(text)
    for end, (name, line) in enumerate(found):
        target = re.search(r"`\((\.L_\w+)\)", line) if name.startswith("BRA") else None
        if target and labels.get(target[1], end + 1) <= end:
            yield [each for each, _ in found[labels[target[1]] : end + 1]]


def row(kernel: Kernel, architecture: str, tool: str) -> str:
    """One line of the table."""
    built = toolchain.build(kernel.program, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.code)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout

    body = max(loops(text), key=_weight, default=[])
    kinds = collections.Counter(name.split(".")[0] for name in body)
    products = sum(count for name, count in kinds.items() if name.endswith("MMA"))
    most = ", ".join(f"{name} {count}" for name, count in kinds.most_common(4))
    shared, resident = kernel.program.shared_bytes, kernel.program.resident
    return (
        f"{kernel.name:<34} {architecture:>4} {kernel.program.threads:>7} {resident:>6} {built.registers:>9} "
        f"{built.spilled_bytes:>6} {shared:>7} {kernel.makes:>11} {len(body):>12} {products:>8}  {most}"
    )


def _weight(names: list[str]) -> tuple[bool, int]:
    """Loops without the collective detours that the compiler adds for warps that have come apart, then by length."""
    return not any(name.startswith("ENDCOLLECTIVE") for name in names), len(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description="Registers, memory, instructions of the CUDA kernels' code.")
    parser.add_argument("--kernel", default="", help="only those whose names contain this")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="only this architecture")
    given = parser.parse_args(arguments)
    tool, lacking = disassembler(), toolchain.missing()
    if lacking or tool is None:
        print(f"gpu_code: {lacking or 'nvdisasm is missing: pip install nvidia-cuda-nvdisasm'}", file=sys.stderr)
        return 1
    print(f"{toolchain.version()}, {Path(tool).name}")
    print(
        f"{'kernel':<34} {'sm':>4} {'threads':>7} {'blocks':>6} {'registers':>9} {'spills':>6} {'shared':>7} "
        f"{'a warp makes':>11} {'instructions':>12} {'products':>8}  most"
    )
    for kernel in kernels():
        for architecture in kernel.architectures:
            if given.kernel in kernel.name and given.arch in (None, architecture):
                print(row(kernel, architecture, tool), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
