"""LoRaQ's own grid: five branches by three pre-transforms, main weights and activations in 4 bits, at equal bytes.

    python benchmarks/grid.py                                 the shipped model, all linears of `transformer_blocks`
    python benchmarks/grid.py --layers 20 --budget rank8@16

A cell is the recipe tiny-loraq-grid-w4a4 with the settings that `cells` lists, and so the same as

    loraq run tiny-loraq-grid-w4a4 --set pre_transform.strategy=hadamard --set branch_quantizer.weight=int6 ...

Every layer is fitted by `quantize_layer` and run as a packed layer on held-out tokens, its activations and those of its
branch rounded as at run time (benchmarks/output_error.py collects the inputs). Columns, geometric means over layers:

    weight     ||W̃ - Ŵ|| / ||W̃||: relative to the transformed weight, so one transform's rows compare, smoothed with
               unsmoothed ones do not
    output     ||PackedLinear(x) - x Wᵀ|| / ||x Wᵀ||: all rows compare
    to none    output, relative to the same layer without a branch; "worse" counts the layers that the branch harms

Beside the grid's fifteen cells each transform has two that it is judged by: no branch, and SVDQuant's branch.

Source of the grid: LoRaQ, arXiv 2604.18117. What was measured is in docs/notes/grid.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from output_error import Layer, collected, mean

from loraq.input_statistics import InputStatistics
from loraq.linear import PackedLinear
from loraq.pipeline import bind, quantize_layer
from loraq.recipe import load as load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-loraq-grid-w4a4.toml"
TRANSFORMS = {
    "none": (),
    "smoothing": ("pre_transform.strategy=smooth_calibrated",),
    "rotation": ("pre_transform.strategy=hadamard", "pre_transform.signs=true"),
}
BRANCHES = {
    "W16A16": ("branch_quantizer.strategy=none",),
    "W8A8": ("branch_quantizer.weight=int8", "branch_quantizer.activation=int8"),
    "W6A6": ("branch_quantizer.weight=int6", "branch_quantizer.activation=int6"),
    "W4A8": ("branch_quantizer.weight=int4", "branch_quantizer.activation=int8"),
    "W4A4": ("branch_quantizer.weight=int4", "branch_quantizer.activation=int4"),
}
NO_BRANCH = "no branch"
SVDQUANT = "SVDQuant's branch"


@attrs.frozen
class Cell:
    """A cell of the grid: where it stands, and what makes the base recipe that cell."""

    transform: str
    branch: str
    settings: tuple[str, ...]


@attrs.frozen
class Figure:
    """One layer in one cell."""

    cell: Cell
    layer: str
    rank: int
    weight_error: float
    output_error: float
    seconds: float


def cells(budget: str) -> list[Cell]:
    """The grid's fifteen cells, and the two that each transform is judged by."""
    rows = {
        NO_BRANCH: ("low_rank.strategy=none",),
        SVDQUANT: ("low_rank.strategy=svd", f"low_rank.budget={budget}", "branch_quantizer.strategy=none"),
    } | {branch: (f"low_rank.budget={budget}", *settings) for branch, settings in BRANCHES.items()}
    return [
        Cell(transform, branch, (*first, *rest))
        for transform, first in TRANSFORMS.items()
        for branch, rest in rows.items()
    ]


def figure(recipe: Path, cell: Cell, layer: Layer) -> Figure:
    """A layer quantized by a cell's recipe and run on its held-out tokens."""
    loaded = load_recipe(recipe, cell.settings)
    bound = bind(loaded.stage)
    asked = InputStatistics({kind: layer.statistics[kind] for kind in bound.statistics})
    quantized = quantize_layer(layer.name, layer.weight, bound, seed=loaded.run.seed, statistics=asked)
    expected = layer.held_out.double() @ layer.weight.double().T
    output = PackedLinear(quantized.layout, quantized.tensors)(layer.held_out).double()
    error = float((output - expected).norm() / expected.norm())
    record = quantized.record
    return Figure(cell, layer.name, record.rank, record.error_after, error, record.seconds)


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table, a line a cell."""
    lines = [
        "| transform | branch | ranks | weight | output | to none | worse | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(each.cell for each in figures):
        rows = [each for each in figures if each.cell == cell]
        alone = {
            each.layer: each.output_error
            for each in figures
            if (each.cell.transform, each.cell.branch) == (cell.transform, NO_BRANCH)
        }
        ratios = [row.output_error / alone[row.layer] for row in rows]
        ranks = sorted({row.rank for row in rows})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        weight, output = mean([row.weight_error for row in rows]), mean([row.output_error for row in rows])
        worse = sum(ratio > 1 for ratio in ratios)
        seconds = sum(row.seconds for row in rows)
        lines.append(
            f"| {cell.transform} | {cell.branch} | {span} | {weight:.4f} | {output:.4f} | {mean(ratios):.3f} "
            f"| {worse} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the grid's base recipe, of a model in a folder")
    parser.add_argument("--budget", default="rank32@16", help="bytes of every branch")
    parser.add_argument("--layers", type=int, default=0, help="take only so many layers, evenly spaced")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    layers = collected(options.recipe, 512, 1024)
    if 0 < options.layers < len(layers):
        layers = [layers[index * len(layers) // options.layers] for index in range(options.layers)]
    figures = [figure(options.recipe, cell, layer) for cell in cells(options.budget) for layer in layers]
    if options.json:
        options.json.write_text(json.dumps([attrs.asdict(each) for each in figures], indent=1) + "\n")
    print(table(figures))
    print(f"{options.budget}, {len(layers)} layers, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
