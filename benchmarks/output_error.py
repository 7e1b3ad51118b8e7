"""Output errors of whole packed layers relative to SVDQuant's, at equal stored bytes, on a model's real inputs.

    python benchmarks/output_error.py                      the shipped model, all linears of `transformer_blocks`
    python benchmarks/output_error.py --layers 20 --json figures.json

The pipeline draws pictures while hooks on every linear layer collect what a calibration would (`InputStatistics`), and
then other pictures, whose inputs are kept for the evaluation only. Every recipe is fitted by `quantize_layer`, and the
packed layer, its activations rounded as at run time, is compared with the 16-bit product on the held-out tokens:

    ||PackedLinear(x) - x Wᵀ|| / ||x Wᵀ||

SVDQuant is the svd strategy with a 16-bit branch and a main quantizer that rounds to nearest, after the same transform.
Every other fit gets the largest rank whose stored bytes stay within that branch's. A figure is the geometric mean over
layers of the ratios to SVDQuant's error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from loraq import registry
from loraq.contracts import AbstractStage, AbstractStatistic
from loraq.input_statistics import ChannelMaxima, ChannelMeans, Gram, InputStatistics, TokenSample
from loraq.linear import PackedLinear
from loraq.match import linear_weight
from loraq.pipeline import bind, make_stage, quantize_layer
from loraq.recipe import load as load_recipe
from loraq.samples import draw, load_pipeline

SHIPPED = Path(__file__).parent.parent / "recipes"
BUDGETS = ("rank32@16", "rank8@16")
ACTIVATIONS = ("int4", "int8")
BASELINE = "svd W16"
STATISTICS = (Gram, ChannelMaxima, ChannelMeans, TokenSample)
PROMPTS = (
    "a small red ring on white",
    "a large blue star on sand",
    "a medium green triangle on black",
    "a large orange hourglass on navy",
    "a small yellow circle on grey",
    "a medium purple cross on white",
    "a large cyan diamond on black",
    "a small pink square on navy",
)
HELD_OUT = (
    "a medium blue hourglass on grey",
    "a small green star on a white ground",
    "a large yellow ring on navy",
    "a medium red diamond on sand",
)


@attrs.frozen(eq=False)
class Layer:
    """A linear layer: its weight (out, inn), what calibration knows of its input, and held-out tokens (tokens, inn)."""

    name: str
    weight: torch.Tensor
    statistics: InputStatistics
    held_out: torch.Tensor


@attrs.frozen
class Method:
    """A row of the table: the recipe's parts as a recipe writes them."""

    name: str
    low_rank: dict[str, Any]
    branch: dict[str, Any]
    main: dict[str, Any] = attrs.field(factory=lambda: {"strategy": "rtn"})
    per_activation: bool = False
    """Whether the fit looks at how the input is rounded, and is made anew for each format."""


@attrs.frozen
class Figure:
    """One fit of one layer at one format of activations; `baseline` is SVDQuant's error."""

    layer: str
    budget: str
    activation: str
    method: str
    rank: int
    error: float
    baseline: float
    seconds: float

    @property
    def ratio(self) -> float:
        """The error relative to SVDQuant's."""
        return self.error / self.baseline


SIXTEEN: dict[str, Any] = {"strategy": "none"}


def width(bits: int) -> dict[str, Any]:
    """A branch of `bits` bits with 8-bit inputs."""
    return {"strategy": "rtn", "weight": f"int{bits}", "activation": "int8"}


def methods(steps: int) -> tuple[Method, ...]:
    """What is compared; those with a strategy that is not installed are left out."""
    loraq, loraq_fast = ({"strategy": name, "steps": steps} for name in ("loraq", "loraq_fast"))
    error_svd, scaled, qera, deflated, svd = (
        {"strategy": name} for name in ("error_svd", "scaled_error_svd", "qera", "deflated", "svd")
    )
    rtn, gptq = {"strategy": "rtn"}, {"strategy": "gptq"}
    noisy = gptq | {"noise": 1, "damping": 0.1}
    rows = [Method("loraq W4", loraq, width(4), rtn)]
    for main, suffix in ((rtn, ""), (gptq, " + gptq")):
        rows += [
            Method(f"svd W16{suffix}", svd, SIXTEEN, main),
            Method(f"error_svd W16{suffix}", error_svd, SIXTEEN, main),
            Method(f"scaled_error_svd W16{suffix}", scaled, SIXTEEN, main),
            Method(f"qera W16{suffix}", qera, SIXTEEN, main),
            Method(f"qera W4{suffix}", qera, width(4), main),
            *(Method(f"loraq_fast W{bits}{suffix}", loraq_fast, width(bits), main) for bits in (8, 6, 4)),
        ]
    rows.append(Method("svd W16 + gptq noise", svd, SIXTEEN, noisy, per_activation=True))
    rows += [
        Method(f"loraq_fast W{bits} + gptq noise", loraq_fast, width(bits), noisy, per_activation=True)
        for bits in (8, 6, 4)
    ]
    for noise in (1, 2):
        quiet = loraq_fast | {"noise": noise}
        rows += [
            Method(f"loraq_fast noise {noise} W{bits}{suffix}", quiet, width(bits), main, per_activation=True)
            for main, suffix in ((rtn, ""), (gptq, " + gptq"), (noisy, " + gptq noise"))
            for bits in (8, 6, 4)
        ]
    wiener = deflated | {"wiener": True, "noise": 0.3, "damping": 0.03}
    for name, fit in (("deflated", deflated), ("deflated wiener", wiener)):
        rows.append(Method(f"{name} W16", fit, SIXTEEN, per_activation=True))
        rows += [Method(f"{name} W{bits}", fit, width(bits), per_activation=True) for bits in (8, 6, 4)]
    fits, mains = registry.names("loraq.low_rank"), registry.names("loraq.main_quantizer")
    return tuple(row for row in rows if row.low_rank["strategy"] in fits and row.main["strategy"] in mains)


def collected(recipe: Path, sample: int, held_out: int, seed: int = 0) -> list[Layer]:
    """The linear layers of the recipe's transformer with their inputs, from pictures drawn as the recipe draws them."""
    loaded = load_recipe(recipe)
    assert loaded.samples is not None
    assert loaded.model.folder is not None
    pipeline = load_pipeline(Path(loaded.model.folder), torch.device("cpu"))
    chosen = {
        name: module
        for name, module in pipeline.transformer.named_modules()
        if "transformer_blocks." in name and linear_weight(module) is not None
    }
    lots: list[dict[str, InputStatistics]] = []
    for kinds, prompts, size in ((STATISTICS, PROMPTS, sample), ((TokenSample,), HELD_OUT, held_out)):
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, dict[type[AbstractStatistic], AbstractStatistic]] = {
            name: {kind: kind.empty(module.in_features, "cpu", sample=size) for kind in kinds}
            for name, module in chosen.items()
        }

        def observe(name: str, input: torch.Tensor, found: Any = found, generator: Any = generator) -> None:
            tokens = input.detach().reshape(-1, input.shape[-1]).float()
            found[name] = {kind: each.observed(tokens, generator) for kind, each in found[name].items()}

        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name, observe=observe: observe(name, given[0]))
            for name, module in chosen.items()
        ]
        draw(pipeline, prompts, seed + len(lots) * 1000, loaded.samples.call, "collecting inputs")
        for hook in hooks:
            hook.remove()
        lots.append({name: InputStatistics(kinds) for name, kinds in found.items()})
    return [
        Layer(name, module.weight.detach().float(), lots[0][name], lots[1][name][TokenSample].tokens)
        for name, module in chosen.items()
    ]


def stages(method: Method, transforms: Sequence[dict[str, Any]], activation: str, budget: str) -> list[AbstractStage]:
    """The recipe of one row."""
    return [
        *(make_stage("pre_transform", **transform) for transform in transforms),
        make_stage("main_quantizer", **method.main, activation=activation),
        make_stage("low_rank", **method.low_rank, budget=budget),
        make_stage("branch_quantizer", **method.branch),
    ]


def errors(
    layer: Layer, method: Method, transforms: Sequence[dict[str, Any]], budget: str, activations: Sequence[str]
) -> dict[str, tuple[float, int, float]]:
    """(relative output error, rank, seconds of the fit) at each format of activations."""
    expected = layer.held_out.double() @ layer.weight.double().T
    found, quantized = {}, None
    for activation in activations:
        if quantized is None or method.per_activation:
            recipe = bind(stages(method, transforms, activation, budget))
            asked = InputStatistics({kind: layer.statistics[kind] for kind in recipe.statistics})
            quantized = quantize_layer(layer.name, layer.weight, recipe, seed=0, statistics=asked)
        layout = attrs.evolve(quantized.layout, activation=make_activation(activation))
        output = PackedLinear(layout, quantized.tensors)(layer.held_out).double()
        relative = float((output - expected).norm() / expected.norm())
        found[activation] = relative, layout.rank, quantized.record.seconds
    return found


def make_activation(name: str) -> Any:
    """The activation that a recipe calls `name`."""
    from loraq.activation import activation

    return activation(name)


def figures_of(
    layer: Layer,
    rows: Sequence[Method],
    transforms: Sequence[dict[str, Any]],
    budgets: Sequence[str],
    activations: Sequence[str],
) -> list[Figure]:
    """All figures of one layer."""
    figures = []
    for budget in budgets:
        base = errors(layer, Method(BASELINE, {"strategy": "svd"}, SIXTEEN), transforms, budget, activations)
        for method in rows:
            made = errors(layer, method, transforms, budget, activations)
            for activation, (error, rank, seconds) in made.items():
                baseline = base[activation][0]
                figures.append(Figure(layer.name, budget, activation, method.name, rank, error, baseline, seconds))
    return figures


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(figures: Sequence[Figure]) -> str:
    """The figures as text, a line a budget and method: mean, best and worst ratio at each format of activations."""
    activations = list(dict.fromkeys(figure.activation for figure in figures))
    head = "".join(f"{'W4' + each.replace('int', 'A'):>8} {'best':>6} {'worst':>6}" for each in activations)
    lines = [f"{'budget':10} {'method':30} {head} {'ranks':>9} {'seconds':>8}"]
    for budget, method in dict.fromkeys((figure.budget, figure.method) for figure in figures):
        rows = [figure for figure in figures if (figure.budget, figure.method) == (budget, method)]
        cells = ""
        for activation in activations:
            ratios = [row.ratio for row in rows if row.activation == activation]
            cells += f"{mean(ratios):8.4f} {min(ratios):6.3f} {max(ratios):6.3f}"
        ranks = sorted({row.rank for row in rows})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        seconds = sum(row.seconds for row in rows if row.activation == activations[0])
        lines.append(f"{budget:10} {method:30} {cells} {span:>9} {seconds:8.1f}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=SHIPPED / "quickstart.toml", help="whose model and samples")
    parser.add_argument("--budget", action="append", choices=BUDGETS, help="a budget (repeatable); both by default")
    parser.add_argument("--activation", action="append", choices=ACTIVATIONS, help="a format (repeatable); both")
    parser.add_argument("--method", action="append", help="a method's name, as in the table (repeatable)")
    parser.add_argument("--transform", action="append", help="'hadamard' (default), 'none' or a TOML table")
    parser.add_argument("--layers", type=int, default=0, help="take only so many layers, evenly spaced")
    parser.add_argument("--steps", type=int, default=200, help="steps of loraq and loraq_fast")
    parser.add_argument("--sample", type=int, default=512, help="tokens kept for calibration")
    parser.add_argument("--held-out", type=int, default=1024, help="tokens kept for the evaluation")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def transforms_of(written: Sequence[str]) -> list[dict[str, Any]]:
    """The transforms as tables: `hadamard` or `{strategy = "hadamard", signs = true}`."""
    from loraq.settings import toml_value

    tables = []
    for each in written:
        table = toml_value(each) if each.startswith("{") else {"strategy": each}
        assert isinstance(table, dict)
        tables.append(table)
    return tables


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    began = time.perf_counter()
    layers = collected(options.recipe, options.sample, options.held_out)
    if 0 < options.layers < len(layers):
        layers = [layers[index * len(layers) // options.layers] for index in range(options.layers)]
    rows = [row for row in methods(options.steps) if not options.method or row.name in options.method]
    transforms = transforms_of(options.transform or ["hadamard"])
    print(f"{len(layers)} layers, inputs collected in {time.perf_counter() - began:.0f} s", flush=True)
    figures: list[Figure] = []
    for layer in layers:
        figures += figures_of(layer, rows, transforms, options.budget or BUDGETS, options.activation or ACTIVATIONS)
        if options.json:  # layer by layer, so that what was measured survives an interruption
            values = [{**attrs.asdict(figure), "ratio": figure.ratio} for figure in figures]
            options.json.write_text(json.dumps(values, indent=1) + "\n")
    print(table(figures))
    for budget, activation in dict.fromkeys((figure.budget, figure.activation) for figure in figures):
        base = mean([each.baseline for each in figures if (each.budget, each.activation) == (budget, activation)])
        print(f"{budget:10} SVDQuant's own error with {activation} activations: {base:.5f}")
    print(f"{len(layers)} layers, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
