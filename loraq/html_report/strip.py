"""The heat strip's data: every quantized layer of a model in its order, and each cell's figures for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from loraq.layer import LayerRecord
from loraq.results import Cell


@attrs.frozen(kw_only=True)
class Quantity:
    """One thing that the strip may show of a layer; `logarithmic` where its size varies by factors."""

    key: str
    title: str
    of: Callable[[Cell, LayerRecord], float | None]
    logarithmic: bool = True


QUANTITIES = (
    Quantity(key="after", title="error after", of=lambda _, layer: layer.error_after),
    Quantity(key="before", title="error before", of=lambda _, layer: layer.error_before),
    Quantity(
        key="ratio",
        title="after / before",
        of=lambda _, layer: layer.error_after / layer.error_before if layer.error_before else None,
        logarithmic=False,
    ),
    Quantity(key="output", title="output error", of=lambda _, layer: layer.output_error_after),
    Quantity(key="run", title="output error as run", of=lambda cell, layer: cell.run_errors.get(layer.name)),
    Quantity(key="bits", title="effective bits", of=lambda _, layer: layer.effective_bits, logarithmic=False),
    Quantity(key="seconds", title="seconds", of=lambda _, layer: layer.seconds),
)


def in_order(cells: Sequence[Cell]) -> list[str]:
    """The names of all layers of all cells: in the order of the cell that has most, others after their predecessor."""
    order: list[str] = []
    for cell in sorted(cells, key=lambda each: -len(each.layers)):
        place = 0
        known = set(order)
        for layer in cell.layers:
            if layer.name in known:
                place = order.index(layer.name) + 1
            else:
                order.insert(place, layer.name)
                place += 1
    return order


def strip(cells: Sequence[Cell]) -> dict[str, Any] | None:
    """For JSON: layers, their shapes, and by cell and quantity a number a layer, None where it stays in 16 bits."""
    with_layers = [cell for cell in cells if cell.layers]
    names = in_order(with_layers)
    if not names:
        return None
    records = {cell.label: {layer.name: layer for layer in cell.layers} for cell in with_layers}
    shapes = {layer.name: f"{layer.out} × {layer.inn}" for cell in with_layers for layer in cell.layers}
    values = {each.key: [_lane(each, cell, names) for cell in with_layers] for each in QUANTITIES}
    shown = [each for each in QUANTITIES if any(value is not None for row in values[each.key] for value in row)]
    return {
        "layers": names,
        "shapes": [shapes[name] for name in names],
        "ranks": [[getattr(records[cell.label].get(name), "rank", None) for name in names] for cell in with_layers],
        "labels": [cell.label for cell in with_layers],
        "quantities": [{"key": each.key, "title": each.title, "logarithmic": each.logarithmic} for each in shown],
        "values": {each.key: values[each.key] for each in shown},
        "reasons": [{each.name: each.reason for each in cell.skipped if each.name in shapes} for cell in with_layers],
    }


def _lane(quantity: Quantity, cell: Cell, names: Sequence[str]) -> list[float | None]:
    """A cell's figures in the order of `names`, of four digits: no more is shown."""
    found = {layer.name: quantity.of(cell, layer) for layer in cell.layers}
    values = [found.get(name) for name in names]
    return [None if value is None or not math.isfinite(value) else float(f"{value:.4g}") for value in values]
