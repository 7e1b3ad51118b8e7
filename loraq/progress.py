"""A progress bar with the time left, on standard error, for long work; silent where nobody watches.

Advances count weights rather than layers: a fit's time goes with the size of its matrix, so the estimate holds.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self


class Progress:
    """`with Progress("quantizing", total) as progress: progress.advance(amount, name)`; silent unless `shown`."""

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(file=sys.stderr)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left  [dim]{task.fields[layer]}"),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, layer="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, amount: int, layer: str) -> None:
        """`amount` of the total is done; `layer` is what was done last."""
        self._bar.update(self._task, advance=amount, layer=layer)
