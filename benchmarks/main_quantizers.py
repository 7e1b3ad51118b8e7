"""Weight and output error of every main quantizer alone, at real inputs, on the layers of a small trained pipeline.

    python benchmarks/main_quantizers.py [FOLDER] [--bits 2 3 4] [--layers 60] [--hadamard]

The input's Gram matrices are collected while the 16-bit pipeline draws four pictures; the output error is judged on the
Gram matrices of four other pictures, `sqrt(tr(D H Dᵀ) / tr(W H Wᵀ))` for D = W - Ŵ. Printed are geometric means over
layers relative to rtn with searched scales in the same bits, and what is stored a weight.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from loraq import factors, registry
from loraq.contracts import AbstractPacking, AbstractPreTransform, AbstractQuantizer
from loraq.input_statistics import Gram, InputStatistics
from loraq.layer import LayerContext
from loraq.layout import Storage
from loraq.recipe import load as load_recipe
from loraq.samples import draw, load_pipeline

SHIPPED = Path(__file__).parent.parent / "recipes"
PROMPTS = (
    "a small red ring on white",
    "a large blue star on sand",
    "a medium green triangle on black",
    "a large orange hourglass on navy",
)
HELD_OUT = (
    "a medium blue hourglass on grey",
    "a small green star on white",
    "a large yellow ring on navy",
    "a medium red diamond on sand",
)


@attrs.frozen(eq=False)
class Layer:
    """A linear layer: its weight (out, inn), and its input's statistics for the fit and for the judgement."""

    name: str
    weight: Tensor
    known: LayerContext
    held_out: LayerContext


def layers(folder: Path, count: int, hadamard: bool) -> list[Layer]:
    """Linears inside the transformer's blocks, evenly spaced, with what their inputs are when pictures are drawn."""
    pipeline = load_pipeline(folder, torch.device("cpu"))
    call = load_recipe(SHIPPED / "quickstart.toml").samples.call  # type: ignore[union-attr]
    linears = [
        (name, module)
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
    linears = [linears[index * len(linears) // count] for index in range(min(count, len(linears)))]
    known = grams(pipeline, linears, PROMPTS, 0, call)
    held_out = grams(pipeline, linears, HELD_OUT, 1000, call)
    transform = cast("AbstractPreTransform", made("pre_transform", "hadamard" if hadamard else "none"))
    found = []
    for name, module in linears:
        weight = module.weight.detach().float()
        blank = LayerContext(name, torch.Generator().manual_seed(0))
        online = transform.prepare(weight, blank)
        given = functools.partial(transform.input, tensors=online)
        moved = [
            attrs.evolve(blank, statistics=InputStatistics({Gram: each}).transformed(given))
            for each in (known[name], held_out[name])
        ]
        found.append(Layer(name, transform.weight(weight, online), *moved))
    return found


def grams(
    pipeline: Any, linears: Sequence[tuple[str, torch.nn.Linear]], prompts: Sequence[str], seed: int, call: Any
) -> dict[str, Gram]:
    """The Gram matrix of each linear's input while the pipeline draws `prompts`."""
    found = {name: Gram.empty(module.in_features, "cpu", sample=0) for name, module in linears}
    generator = torch.Generator()

    def hook(name: str) -> Any:
        def collect(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            tokens = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            found[name] = found[name].observed(tokens, generator)

        return collect

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    draw(pipeline, prompts, seed, call, "drawing")
    for handle in handles:
        handle.remove()
    return found


def made(kind: str, strategy: str, **options: Any) -> Any:
    """A strategy by its name, with options as a recipe has them."""
    return cast("type", registry.load(f"loraq.{kind}", strategy))(**options)


def quantizers(bits: int) -> dict[str, AbstractQuantizer]:
    """What is compared at `bits` bits, the first being what all others are relative to."""
    whole, offset, asymmetric = f"int{bits}", f"int{bits}_offset", f"int{bits}_asymmetric"
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "rtn search": ("rtn", {"weight": whole}),
        "rtn amax": ("rtn", {"weight": whole, "scale": "amax"}),
        "rtn search, groups of 32": ("rtn", {"weight": whole, "group": 32}),
        "rtn search, asymmetric": ("rtn", {"weight": asymmetric}),
        "rtn search, offset": ("rtn", {"weight": offset}),
        "hqq": ("hqq", {"weight": whole}),
        "hqq, asymmetric": ("hqq", {"weight": asymmetric}),
        "hqq, offset": ("hqq", {"weight": offset}),
        "gptq": ("gptq", {"weight": whole}),
        "gptq, groups of 32": ("gptq", {"weight": whole, "group": 32}),
        "gptq, act_order = false": ("gptq", {"weight": whole, "act_order": False}),
        "gptq, asymmetric": ("gptq", {"weight": asymmetric}),
        "gptq, offset": ("gptq", {"weight": offset}),
    }
    if f"int{bits}_mixed" in registry.names("loraq.format"):
        rows |= {
            "outlier_mixed": ("outlier_mixed", {"weight": f"int{bits}_mixed"}),
            "outlier_mixed, kurtosis": ("outlier_mixed", {"weight": f"int{bits}_mixed", "order": "kurtosis"}),
            "rtn search, mixed": ("rtn", {"weight": f"int{bits}_mixed"}),
            "gptq, mixed": ("gptq", {"weight": f"int{bits}_mixed"}),
        }
    if f"int{bits - 1}_binary" in registry.names("loraq.format"):
        rows |= {
            "residual_binary": ("residual_binary", {"weight": f"int{bits - 1}_binary"}),
            "rtn search, binary": ("rtn", {"weight": f"int{bits - 1}_binary"}),
            "gptq, binary": ("gptq", {"weight": f"int{bits - 1}_binary"}),
        }
    return {name: made("main_quantizer", strategy, **options) for name, (strategy, options) in rows.items()}


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def table(found: Sequence[Layer], bits: int) -> None:
    """Print the table for `bits` bits."""
    packing = cast("AbstractPacking", made("packing", "rows"))
    baseline: list[tuple[float, float]] = []
    print(f"| int{bits} | bits a weight | weight error | output error | seconds |\n|---|---|---|---|---|")
    for name, quantizer in quantizers(bits).items():
        errors, stored, began = [], 0, time.perf_counter()
        for layer in found:
            coded = quantizer.encode(layer.weight, layer.known)
            stored += Storage(coded.format, coded.group).stored_bytes(*coded.shape, packing)
            difference = layer.weight - coded.decode()
            errors.append((factors.deviation(difference), factors.deviation(difference, layer.held_out)))
        seconds = time.perf_counter() - began
        baseline = baseline or errors
        ratios = [
            [mine / base for mine, base in zip(*pair, strict=True)] for pair in zip(errors, baseline, strict=True)
        ]
        weight, output = mean([ratio[0] for ratio in ratios]), mean([ratio[1] for ratio in ratios])
        width = 8 * stored / sum(layer.weight.numel() for layer in found)
        print(f"| {name} | {width:.3f} | {weight:.3f} | {output:.3f} | {seconds:.1f} |", flush=True)
    print()


def main() -> None:
    """Read the arguments, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED / "tiny-pixart-sigma")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], choices=[2, 3, 4])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--hadamard", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = layers(arguments.folder, arguments.layers, arguments.hadamard)
    for bits in arguments.bits:
        table(found, bits)


if __name__ == "__main__":
    main()
