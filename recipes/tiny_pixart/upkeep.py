"""What both training stages share: averaged weights, the learning-rate schedule, checkpoints and progress.

A checkpoint is one file, written beside its final name and then renamed, so that a training run may be
killed at any moment and resumed from the last complete file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn


class AveragedWeights:
    """Exponential moving average of the parameters of some modules."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.decay = decay
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the live weights; early on they follow faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live weights and averages; calling it twice restores both."""
        for parameter, average in zip(self.live, self.averages, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def restore(self, averages: list[torch.Tensor]) -> None:
        """Take over the averages of a checkpoint."""
        for average, saved in zip(self.averages, averages, strict=True):
            average.copy_(saved)


def learning_rate_share(step: int, steps: int, warm_up: int, decay_share: float) -> float:
    """Warm up, hold, then fall linearly to nearly zero over the last share of the steps.

    Unlike a cosine over all steps this lets a run be prolonged on resume without a jump in the rate.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    decay_steps = max(1.0, decay_share * steps)
    return min(1.0, max(0.01, (steps - step) / decay_steps))


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def load_if_present(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or return None where there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


class ThreadChooser:
    """Uses as many threads as are fastest at the moment.

    When another program takes one of two cores, two threads wait for each other at every operation and are
    slower than one. So every `period` steps each count is tried for a few steps and the fastest is kept.
    """

    trial_steps = 3

    def __init__(self, most: int, period: int = 40) -> None:
        self.counts = list(range(most, 0, -1))
        self.period = max(period, 2 * self.trial_steps * most)
        self.times: dict[int, list[float]] = {}
        self.last: float | None = None

    def before_step(self, step: int) -> None:
        """Note how long the step before this one took and set the number of threads for this one."""
        now = time.monotonic()
        if self.last is not None:
            self.times.setdefault(torch.get_num_threads(), []).append(now - self.last)
        self.last = now
        trial, within = divmod(step % self.period, self.trial_steps)
        if within == 0 and trial < len(self.counts):
            if trial == 0:
                self.times = {}
            torch.set_num_threads(self.counts[trial])
        elif within == 0 and trial == len(self.counts) and len(self.times) == len(self.counts):
            torch.set_num_threads(min(self.times, key=lambda count: median(self.times[count])))


class Progress:
    """Prints a line now and then: the step, the mean of every figure since the last line, the pace."""

    def __init__(self, stage: str, steps: int, every: int) -> None:
        self.stage, self.steps, self.every = stage, steps, every
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.monotonic()

    def add(self, step: int, **figures: float) -> None:
        """Note one step's figures; print when a line is due."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        pace = (time.monotonic() - self.started) / self.count
        words = "  ".join(f"{name} {value / self.count:.4f}" for name, value in self.sums.items())
        print(
            f"{self.stage} {step + 1}/{self.steps}  {words}  {pace:.3f} s/step  {torch.get_num_threads()} threads",
            flush=True,
        )
        self.sums, self.count, self.started = {}, 0, time.monotonic()
