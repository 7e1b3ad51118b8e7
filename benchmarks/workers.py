"""What a second worker brings: one worker, two threads of one process, two processes of torchrun, in turns.

    python benchmarks/workers.py [--blocks 2] [--steps 60] [--rounds 3] [--workers 2] [--strategy loraq_fast]

The layers are those of PixArt-Sigma at its true size, cut to a few blocks (seeded weights of benchmarks/true_size.py),
the recipe is the shipped one. Timed is what a run does between opening its shards and their last byte on disk: reading,
fitting, writing and syncing; not Python's start and imports, which each process pays once, nor loading compiled
kernels. Every fit has one thread. Ratios are those of one round, and all ways must give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from true_size import ARCHITECTURES, skeleton_of, write_model

import loraq
from loraq import fitting
from loraq.recipe import Recipe, load
from loraq.shipped import recipe_path


@attrs.frozen
class Measured:
    """Seconds by the clock, and of processors."""

    clock: float
    processors: float


def prepared(arguments: argparse.Namespace) -> Recipe:
    """The recipe, for the model in the folder that the arguments name."""
    options = [f"run.output={arguments.output}", f"run.workers={arguments.workers}", "run.device=cpu"]
    options += [f"low_rank.strategy={arguments.strategy}"] if arguments.strategy else []
    options += [f"low_rank.steps={arguments.steps}"] if arguments.steps else []
    recipe = load(recipe_path(ARCHITECTURES["pixart-sigma"].recipe), options)
    model = attrs.evolve(recipe.model, folder=str(arguments.model), hub=None)
    return attrs.evolve(recipe, model=model, samples=None)


def timed_run(recipe: Recipe) -> Measured:
    """Run a recipe, in the team that the environment names, and time the layers."""
    pipeline = recipe.pipeline()
    warm = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    attrs.evolve(pipeline, skip=(), overrides=()).quantize(warm)  # loads the compiled kernels
    found: list[Measured] = []
    write_layers: Callable[..., Any] = fitting.write_layers

    def timed(*values: Any) -> Any:
        began, used = time.perf_counter(), time.process_time()
        written = write_layers(*values)
        found.append(Measured(time.perf_counter() - began, time.process_time() - used))
        return written

    with mock.patch("loraq.run.write_layers", timed):
        loraq.run_recipe(recipe)
    return found[0]


def of_processes(arguments: argparse.Namespace, count: int) -> Measured:
    """The same by `count` processes of one worker each."""
    told = Path(arguments.output).with_name("told")
    told.mkdir()
    own = [f"--{name}={getattr(arguments, name)}" for name in ("model", "output", "steps", "strategy")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, __file__, *own, "--workers=1", f"--told={told}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    every = [Measured(**json.loads(path.read_text())) for path in told.iterdir()]
    shutil.rmtree(told)
    return Measured(max(each.clock for each in every), sum(each.processors for each in every))


def rounds(arguments: argparse.Namespace) -> Iterator[dict[str, Measured]]:
    """Each way once, again and again; results must be the same bytes."""
    output, expected = Path(arguments.output), None
    for _ in range(arguments.rounds):
        found = {}
        for name, workers, count in (
            ("1 worker", 1, 1),
            (f"{arguments.workers} workers", arguments.workers, 1),
            (f"{arguments.workers} processes", 1, arguments.workers),
        ):
            arguments_here = argparse.Namespace(**vars(arguments) | {"workers": workers})
            found[name] = timed_run(prepared(arguments_here)) if count == 1 else of_processes(arguments_here, count)
            made = {path.name: path.read_bytes() for path in output.rglob("*.safetensors")}
            if expected is not None and made != expected:
                raise SystemExit(f"{name}: the result has other bytes")
            expected = made
            shutil.rmtree(output)
        yield found


def main() -> None:
    """Build, run in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the model")
    parser.add_argument("--steps", type=int, default=60, help="loraq_fast's steps; 0 where the strategy has none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="how many are compared with one")
    parser.add_argument("--strategy", default="", help="another low-rank strategy than the recipe's")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--told", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.told:  # a process of torchrun
        measured = timed_run(prepared(arguments))
        handle, _ = tempfile.mkstemp(dir=arguments.told)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(attrs.asdict(measured), file)
        return
    with tempfile.TemporaryDirectory(prefix="loraq-") as home:
        arguments.model, arguments.output = f"{home}/model", f"{home}/out"
        weights = write_model(Path(arguments.model), skeleton_of(ARCHITECTURES["pixart-sigma"], arguments.blocks))
        print(f"PixArt-Sigma, {arguments.blocks} blocks, {weights / 1e6:.0f} M weights, {arguments.rounds} rounds")
        found = list(rounds(arguments))
    print(f"{'':14}{'seconds':>9}{'processor s':>13}{'times as fast':>15}   (each round)")
    for name in found[0]:
        clock = statistics.median(each[name].clock for each in found)
        processors = statistics.median(each[name].processors for each in found)
        ratios = [each["1 worker"].clock / each[name].clock for each in found]
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:14}{clock:9.1f}{processors:13.1f}{statistics.median(ratios):15.2f}   ({told})")


if __name__ == "__main__":
    main()
