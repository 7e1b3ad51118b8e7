"""What one fit takes of memory at its peak, for every strategy that needs no data and every number format.

    python benchmarks/fit_memory.py [--shape 18432x3072] [--only PATTERN]

One worker, one thread, in one process: the system's own peak (VmHWM) is set back before each fit, and freed memory is
given back. A weight (16 bits, a decaying spectrum) goes through a whole recipe, transform, fit and packing; printed is
what the peak was above what the process held before, the weight in 16 bits among it, in multiples of its bytes in
float32. `promised` is 3 and a GiB. Steps and rounds are cut to two, which changes no memory.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Iterator
from typing import Any

import attrs
import torch

from loraq import registry
from loraq.blocks import trim
from loraq.contracts import AbstractCalibrated
from loraq.pipeline import LayerRecipe, bind, make_stage, quantize_layer

SHORT = {"steps": 2, "rounds": 2}


def resident(field: str) -> int:
    """Bytes of this process, by /proc: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def begin() -> int:
    """Give back what is free, set the peak back, and return what the process holds."""
    trim()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return resident("VmRSS")


def cases() -> Iterator[tuple[str, LayerRecipe]]:
    """Each low-rank strategy and main quantizer that needs no data, and each number format, in a whole recipe."""
    for name in registry.names("loraq.low_rank"):
        if (recipe := recipe_of(low_rank=name)) is not None:
            yield name, recipe
    for name in registry.names("loraq.main_quantizer"):
        if (recipe := recipe_of(main=name)) is not None:
            yield f"loraq_fast, {name}", recipe
    for name in registry.names("loraq.format"):
        if (recipe := recipe_of(weight=name)) is not None:
            yield f"loraq_fast, rtn {name}", recipe


def recipe_of(low_rank: str = "loraq_fast", main: str = "rtn", weight: str | None = None) -> LayerRecipe | None:
    """The recipe with this strategy or format; None where one of them needs data or does not take the other."""
    chosen: list[tuple[str, str, dict[str, Any]]] = [
        ("pre_transform", "hadamard", {"signs": True}),
        ("main_quantizer", main, {} if weight is None else {"weight": weight}),
        ("low_rank", low_rank, {} if low_rank == "none" else {"budget": "rank32@16"}),
        ("branch_quantizer", "rtn", {"weight": "int4", "activation": "int8"}),
    ]
    stages = []
    for kind, name, options in chosen[:3] if low_rank == "none" else chosen:
        strategy: Any = registry.load(f"loraq.{kind}", name)
        if issubclass(strategy, AbstractCalibrated):
            return None
        known = {field.name for field in attrs.fields(strategy)}
        short = {name: value for name, value in SHORT.items() if name in known}
        try:
            stages.append(make_stage(kind, name, **short, **options))
        except ValueError:
            return None
    return bind(stages)


def peak(recipe: LayerRecipe, out: int, inn: int) -> tuple[float, float]:
    """(bytes above what the process held before, seconds) of one fit."""
    generator = torch.Generator().manual_seed(0)
    before = begin()
    left = torch.randn(out, 64, generator=generator) * torch.arange(1, 65).pow(-0.6)
    weight = torch.empty(out, inn, dtype=torch.bfloat16)
    right = torch.randn(64, inn, generator=generator)
    for start in range(0, out, 256):
        rows = left[start : start + 256] @ right
        weight[start : start + 256] = (rows + torch.randn(rows.shape, generator=generator)) * 0.02
    begin()
    started = time.perf_counter()
    quantize_layer("layer", weight, recipe, seed=0)
    return resident("VmHWM") - before, time.perf_counter() - started


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="18432x3072", help="out x inn")
    parser.add_argument("--only", default="*")
    options = parser.parse_args()
    out, inn = (int(side) for side in options.shape.split("x"))
    torch.set_num_threads(1)
    size = 4 * out * inn
    print(f"{out}x{inn}, {size / 2**20:.0f} MiB in float32, promised {3 + 2**30 / size:.1f}\n")
    for name, recipe in cases():
        if fnmatch.fnmatch(name, options.only):
            peak(recipe, 128, 256)  # compile
            found, seconds = peak(recipe, out, inn)
            print(f"{name:36}{found / size:6.1f}  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
