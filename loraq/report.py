"""What a run did, as an object and as a table: per layer and in total, and what was left out and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs

from loraq.layer import LayerRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loraq.match import MatchedLayer


@attrs.frozen
class Skipped:
    """A layer with weights that stayed in 16 bits, and why."""

    name: str
    weights: int
    reason: str


def _tuple(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True)
class Report:
    """What was quantized, how well, and what was not. Errors are relative weight errors (see LayerRecord).

    Files' bytes are 0 for a module that was quantized in memory.
    """

    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...] = ()
    output: str | None = None
    source_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    already_done: bool = False
    warnings: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    """What the recipe says and nothing came of, a sentence each."""
    pictures: str | None = None

    @property
    def weights(self) -> int:
        """How many weights were quantized."""
        return sum(layer.weights for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed layers but for their biases."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def effective_bits(self) -> float:
        """Stored bits per quantized weight."""
        return 8 * self.stored_bytes / self.weights if self.weights else 0.0

    @property
    def error_before(self) -> float:
        """Geometric mean over layers of the error with the main quantizer alone."""
        return geometric_mean(layer.error_before for layer in self.layers)

    @property
    def error_after(self) -> float:
        """Geometric mean over layers of the error with the branch."""
        return geometric_mean(layer.error_after for layer in self.layers)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        totals = {
            "quantized_layers": len(self.layers),
            "quantized_weights": self.weights,
            "stored_bytes": self.stored_bytes,
            "effective_bits": self.effective_bits,
            "error_before": self.error_before,
            "error_after": self.error_after,
        }
        layers = [attrs.asdict(layer) | {"effective_bits": layer.effective_bits} for layer in self.layers]
        skipped = [attrs.asdict(each) for each in self.skipped]
        rest = attrs.asdict(self, filter=lambda field, _: field.name not in ("layers", "skipped"))
        return rest | {"total": totals, "layers": layers, "skipped": skipped}

    def print(self, console: Console) -> None:
        """The table and a summary."""
        console.print(layer_table(self.layers))
        if self.skipped:
            console.print(skipped_line(self.skipped), style="dim", highlight=False, markup=False)
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of the values above zero; 0 where there is none."""
    logarithms = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 0.0


def size(count: float) -> str:
    """Bytes for people: `12.3 MB`, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `3.5 min`, `2.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def skipped_line(skipped: Iterable[Skipped]) -> str:
    """One line on what stays in 16 bits: reasons, how many layers, how many weights."""
    reasons: dict[str, list[int]] = {}
    for each in skipped:
        reasons.setdefault(each.reason, []).append(each.weights)
    told = [f"{len(found)} ({sum(found):,} weights): {reason}" for reason, found in reasons.items()]
    return "left in 16 bits  " + "\n                 ".join(told)


def layer_table(layers: Iterable[LayerRecord]) -> Table:
    """Per layer and in total: shape, rank, effective bits, error before and after, bytes."""
    from rich import box
    from rich.table import Table

    rows = tuple(layers)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False)
    weights = sum(row.weights for row in rows)
    stored = sum(row.stored_bytes for row in rows)
    before = geometric_mean(row.error_before for row in rows)
    after = geometric_mean(row.error_after for row in rows)
    table.add_column("layer", f"{len(rows)} layers", overflow="fold")  # the only one that gives way
    table.add_column("out\nx inn", f"{weights:,}", justify="right", no_wrap=True)
    table.add_column("rank", "", justify="right", no_wrap=True)
    table.add_column("bits", f"{8 * stored / weights:.2f}" if weights else "", justify="right", no_wrap=True)
    table.add_column("error\nbefore", f"{before:.4f}", justify="right", no_wrap=True)
    table.add_column("error\nafter", f"{after:.4f}", justify="right", no_wrap=True)
    table.add_column("ratio", f"{after / before:.2f}" if before else "", justify="right", no_wrap=True)
    table.add_column("bytes", f"{stored:,}", justify="right", no_wrap=True)
    for row in rows:
        ratio = f"{row.error_after / row.error_before:.2f}" if row.error_before else ""
        table.add_row(
            row.name, f"{row.out}x{row.inn}", str(row.rank or "-"), f"{row.effective_bits:.2f}",
            f"{row.error_before:.4f}", f"{row.error_after:.4f}", ratio, f"{row.stored_bytes:,}",
        )  # fmt: skip
    return table


def plan_table(layers: Iterable[MatchedLayer]) -> Table:
    """Per layer: shape, formats, rank, bits and bytes, before anything is computed."""
    from rich import box
    from rich.table import Table

    rows = tuple(layers)
    weights = sum(row.out * row.inn for row in rows)
    stored = sum(row.layout.stored_bytes for row in rows)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False)
    table.add_column("layer", f"{len(rows)} layers", overflow="fold")  # the only one that gives way
    table.add_column("out\nx inn", f"{weights:,}", justify="right", no_wrap=True)
    table.add_column("main", no_wrap=True)
    table.add_column("branch", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("bits", f"{8 * stored / weights:.2f}" if weights else "", justify="right", no_wrap=True)
    table.add_column("bytes", f"{stored:,}", justify="right", no_wrap=True)
    for row in rows:
        layout = row.layout
        branch = "-" if layout.down is None else f"{layout.down.format.name} x {layout.branch_activation}"
        table.add_row(
            row.name, f"{row.out}x{row.inn}", f"{layout.main.format.name} x {layout.activation}", branch,
            str(layout.rank or "-"), f"{8 * layout.stored_bytes / (row.out * row.inn):.2f}",
            f"{layout.stored_bytes:,}",
        )  # fmt: skip
    return table
