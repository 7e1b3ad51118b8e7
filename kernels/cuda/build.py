"""Cubins built beforehand, on any machine with the compiler: for GPUs on machines without it.

    python -m loraq.kernels.cuda.build --arch 90 --arch 86 --output cubins
    LORAQ_CUDA_PREBUILT=cubins python ...                     there, with the same version of LoRaQ

Built are the programs of the shipped recipes' layers and of benchmarks/gpu.py for inputs and outputs in bfloat16; with
--checkpoint FOLDER (the folder with a quantized transformer's config.json) those of its layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from loraq.errors import LoraqError
from loraq.layout import Layout

from . import cache, fallback, plan, runner, toolchain
from .plain import Plain
from .program import AbstractProgram

_RANK_OF_BITS = {8: 62, 4: 118}
"""The ranks that `budget = "rank32@16"` comes to with a branch of so many bits; only its count of 64s matters."""


_TOKEN = {"format": "int8", "group": "token"}
_MAIN: tuple[tuple[str, Any], ...] = (("int4", "int4"), ("int4", "int8"), ("int4x2", _TOKEN))
"""Formats of main weights and their inputs."""


def standard_layouts() -> Iterator[Layout]:
    """Layers like those of the shipped recipes, rotated or not, with a branch of 4 or 8 bits or none."""
    rotated: list[dict[str, Any]] = [{"strategy": "hadamard", "signs": True}]
    for inn in (1152, 2240):  # blocks of 128 and of 64
        for weight, activation in _MAIN:
            for transforms in ([], rotated):
                plain = {
                    "out": 64,
                    "inn": inn,
                    "rank": 0,
                    "main": {"format": weight, "group": 64},
                    "activation": activation,
                    "packing": {"strategy": "rows"},
                    "transforms": transforms,
                }
                yield Layout.from_plain(plain)
                for bits, rank in _RANK_OF_BITS.items():
                    both = {"format": f"int{bits}", "group": 64}
                    yield Layout.from_plain(
                        plain | {"rank": rank, "down": both, "up": both, "branch_activation": "int8"}
                    )


def checkpoint_layouts(folder: Path) -> Iterator[Layout]:
    """The layouts that a quantized model's config.json lists."""
    config = json.loads((folder / "config.json").read_text())
    for plain in config["quantization_config"]["layouts"]:
        yield Layout.from_plain(plain)


def programs(layouts: Iterator[Layout], dtype: torch.dtype, architecture: str) -> list[AbstractProgram]:
    """What layers of these layouts run, with a bias and without, each program once."""
    found: dict[AbstractProgram, None] = {}
    for layout in layouts:
        if plan.misfit(layout, "main") is not None:
            if fallback.misfit(layout) is None:
                found |= dict.fromkeys(Plain(a, w) for a in (8, 16) for w in (4, 8, 16))
            continue
        planned = plan.Plan.of(layout)
        beside = bool(layout.rank) and not planned.rank  # a branch in torch
        input = torch.float32 if beside or not planned.fused else dtype
        output = torch.float32 if beside else dtype
        for bias in (False, True):
            found |= dict.fromkeys(runner.programs_of(planned, input, output, bias, architecture))
    return list(found)


def standard_programs(architecture: str) -> list[AbstractProgram]:
    """The programs that are built where no checkpoint is named."""
    return programs(standard_layouts(), torch.bfloat16, architecture)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m loraq.kernels.cuda.build", description="Build cubins beforehand.")
    parser.add_argument(
        "--arch",
        action="append",
        choices=toolchain.ARCHITECTURES,
        help="may be repeated; default 90",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the cubins")
    parser.add_argument("--checkpoint", type=Path, help="a quantized transformer's folder, with its config.json")
    parser.add_argument("--dtype", choices=list(runner.NAMES), default="bfloat16", help="of inputs and outputs")
    given = parser.parse_args(arguments)
    lacking = toolchain.missing()
    if lacking is not None:
        print(f"loraq: {lacking}", file=sys.stderr)
        return 1
    try:
        for architecture in given.arch or ["90"]:
            wanted = standard_programs(architecture)
            if given.checkpoint is not None:
                wanted = programs(checkpoint_layouts(given.checkpoint), runner.NAMES[given.dtype], architecture)
            _build(wanted, architecture, given.output)
    except (OSError, KeyError, ValueError, LoraqError) as error:
        print(f"loraq: {given.checkpoint} is not a quantized model's folder: {error}", file=sys.stderr)
        return 2
    return 0


def _build(wanted: Sequence[AbstractProgram], architecture: str, folder: Path) -> None:
    for place, program in enumerate(wanted, 1):
        code = cache.code_for(program, architecture)
        path = folder / cache.file_name(program, code)
        start = time.monotonic()
        if not path.exists():
            cache.build(program, code, path)
        print(f"{place:3}/{len(wanted)} {path.name} {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
