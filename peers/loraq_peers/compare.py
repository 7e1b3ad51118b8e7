"""`loraq-peers`: one table of LoRaQ and other libraries, layer by layer, on the same weights, inputs and bytes.

    loraq-peers MODEL                     every method whose library is installed
    loraq-peers MODEL --method sdnq --method "LoRaQ's rtn"

MODEL is a whole diffusers pipeline's folder. Its 16-bit model draws a few prompts once, which gives tokens of every
layer's input. Columns: bits a weight, all that is stored counted; the weight's error `||W - Ŵ|| / ||W||`; the output's
error `||y - ŷ|| / ||y||` on those tokens with activations in 16 bits (W4A16), 8 bits a token (W4A8) and 4 bits in
groups of 64 (W4A4), as LoRaQ runs it: geometric means over the layers. A peer that rounds no activations, or not to 4
bits, is marked: its figures there are its weights under LoRaQ's rounding. The pictures are `loraq bench`'s:
`loraq-peers --suite` prints the suite's path.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import loraq
from loraq.errors import LoraqError
from loraq.generate import call_of
from loraq.report import geometric_mean
from loraq.samples import draw_together, load_pipeline

SUITE = Path(__file__).parent / "suites" / "peers.toml"
WEIGHT_ONLY = "W4A16"
ACTIVATIONS: dict[str, Any] = {WEIGHT_ONLY: "none", "W4A8": {"format": "int8", "group": "token"}, "W4A4": "int4"}
"""How inputs are rounded in each column."""
_ROWS = 16
"""Tokens kept of each call of a layer."""
_SEED = 2**31
"""Of the first prompt's noise; no picture of a suite has it."""


@attrs.frozen
class Method:
    """A row of the table: what quantizes, and what the library itself rounds activations to."""

    package: str
    """The module that must be installed; empty for LoRaQ's own."""
    main: Mapping[str, Any]
    transform: Mapping[str, Any] | None = None
    branch: Mapping[str, Any] | None = None
    coded: Mapping[str, Any] | None = None
    """The branch quantizer; None for 16 bits."""
    rounds: tuple[str, ...] = ()
    """The columns in which the library's own rounding of activations is of this kind."""

    def stages(self, activation: object, budget: str) -> list[Any]:
        """The pipeline's stages."""
        found = [] if self.transform is None else [loraq.stage("pre_transform", **self.transform)]
        found.append(loraq.stage("main_quantizer", **self.main, activation=activation))
        if self.branch is not None:
            found.append(loraq.stage("low_rank", **self.branch, budget=budget))
            coded = {"strategy": "none"} if self.coded is None else self.coded
            found.append(loraq.stage("branch_quantizer", **coded))
        return found


ROTATED = {"strategy": "hadamard", "signs": True}
RTN = {"strategy": "rtn", "weight": "int4"}
ALL = tuple(ACTIVATIONS)
METHODS: dict[str, Method] = {
    "torchao": Method("torchao", {"strategy": "torchao", "group": 64}, rounds=("W4A16", "W4A8")),
    "optimum-quanto": Method("optimum", {"strategy": "quanto", "group": 128}, rounds=("W4A16",)),
    "hqq": Method("hqq", {"strategy": "hqq_package", "group": 128}, rounds=("W4A16",)),
    "sdnq": Method("sdnq", {"strategy": "sdnq", "weight": "uint4", "group": 128}, rounds=("W4A16", "W4A8")),
    "LoRaQ's rtn": Method("", RTN, rounds=ALL),
    "LoRaQ's rtn, rotated": Method("", RTN, ROTATED, rounds=ALL),
    "sdnq, SVD": Method(
        "sdnq", {"strategy": "sdnq", "weight": "uint4", "group": 128}, None, {"strategy": "sdnq_svd"}, None, ALL[:2]
    ),
    "sdnq, SVD, Hadamard": Method(
        "sdnq",
        {"strategy": "sdnq", "weight": "uint4", "group": 128},
        {"strategy": "sdnq_hadamard"},
        {"strategy": "sdnq_svd"},
        None,
        ALL[:2],
    ),
    "sdnq, SVD, Hadamard, int4": Method(
        "sdnq",
        {"strategy": "sdnq", "weight": "int4", "group": 64},
        {"strategy": "sdnq_hadamard"},
        {"strategy": "sdnq_svd"},
        None,
        ALL[:2],
    ),
    "SVDQuant's branch, rotated": Method("", RTN, ROTATED, {"strategy": "svd"}, None, ALL),
    "LoRaQ, W4A8 branch": Method(
        "",
        RTN,
        ROTATED,
        {"strategy": "loraq_fast", "steps": 200, "noise": 1.0},
        {"strategy": "rtn", "weight": "int4", "activation": "int8"},
        ALL,
    ),
}
"""Without a branch all have 4.25 bits a weight; with one, the budget's bytes more."""


@attrs.frozen(kw_only=True)
class Found:
    """What a method got: bits a weight, the weight's error, the output's by column; geometric means over layers."""

    bits: float
    weight: float
    output: Mapping[str, float]
    seconds: float


def collected(
    pipeline: Any, names: Sequence[str], prompts: Sequence[str], call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tokens (tokens, inn) of each layer's input while the 16-bit pipeline draws `prompts`, by the layer's name."""
    tokens: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            flat = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            tokens[name].append(flat[torch.linspace(0, len(flat) - 1, min(_ROWS, len(flat))).long()])

        return keep

    handles = [pipeline.transformer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for place, prompt in enumerate(prompts):
        draw_together(pipeline, [prompt], [_SEED + place], call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in tokens.items()}


def measured(method: Method, model: nn.Module, tokens: Mapping[str, Tensor], budget: str = "rank32@16") -> Found:
    """Quantize copies of the model, once a column, and compare the layers' outputs."""
    output: dict[str, float] = {}
    for column, activation in ACTIVATIONS.items():
        packed = copy.deepcopy(model)
        report = loraq.Pipeline(method.stages(activation, budget)).quantize(packed)
        if column == WEIGHT_ONLY:
            plain = report
        output[column] = geometric_mean(output_errors(model, packed, tokens))
    return Found(
        bits=plain.effective_bits,
        weight=plain.error_after,
        output=output,
        seconds=sum(record.seconds for record in plain.layers),
    )


def output_errors(model: nn.Module, packed: nn.Module, tokens: Mapping[str, Tensor]) -> Iterator[float]:
    """`||y - ŷ|| / ||y||` of each layer, biases left out."""
    with torch.inference_mode():
        for name, input in tokens.items():
            layer, other = model.get_submodule(name), packed.get_submodule(name)
            bias = torch.zeros(()) if layer.bias is None else layer.bias
            expected = layer(input) - bias
            yield float((other(input) - bias - expected).norm() / expected.norm())


def lines(found: Mapping[str, Found]) -> Iterator[str]:
    """The table as text."""
    columns = "".join(f" {column:>10}" for column in ACTIVATIONS)
    yield f"{'method':28} {'bits':>6} {'weight':>9}{columns} {'fit s':>7}"
    for name, row in found.items():
        own = METHODS[name].rounds
        columns = "".join(f" {row.output[column]:>9.5f}{' ' if column in own else '*'}" for column in ACTIVATIONS)
        yield f"{name:28} {row.bits:6.3f} {row.weight:9.5f}{columns} {row.seconds:7.1f}"
    yield "* the library does not round activations so: its weights under LoRaQ's rounding"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="loraq-peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="folder of a diffusers pipeline")
    parser.add_argument("--prompt", action="append", help="drawn for the layers' inputs; repeatable")
    parser.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="argument of the pipeline's call"
    )
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; by default all installed")
    parser.add_argument("--budget", default="rank32@16", help="the branches' bytes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--suite", action="store_true", help="print the path of the suite for `loraq bench`, and end")
    options = parser.parse_args()
    if options.model is None and not options.suite:
        parser.error("give the folder of a diffusers pipeline, or --suite")
    return options


def main() -> None:
    """The command: exit code 2 where the input is wrong."""
    try:
        run(arguments())
    except LoraqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.suite:
        print(SUITE)
        return
    wanted = options.method or METHODS
    missing = {name for name in wanted if METHODS[name].package and not importlib.util.find_spec(METHODS[name].package)}
    for name in sorted(missing):
        print(f"{name} is left out: {METHODS[name].package} is not installed", file=sys.stderr)
    pipeline = load_pipeline(options.model, torch.device("cpu"))
    pipeline_of_all = loraq.Pipeline(METHODS["LoRaQ's rtn"].stages("none", options.budget))
    names = [record.name for record in pipeline_of_all.quantize(copy.deepcopy(pipeline.transformer)).layers]
    prompts = options.prompt or ["a small red ring on white", "a large blue star on sand"]
    tokens = collected(pipeline, names, prompts, call_of(None, options.call))
    found = {
        name: measured(METHODS[name], pipeline.transformer, tokens, options.budget)
        for name in wanted
        if name not in missing
    }
    print(f"{len(names)} layers of {options.model}, {len(next(iter(tokens.values())))} tokens each")
    print("\n".join(lines(found)))
    if options.json:
        options.json.write_text(json.dumps({name: attrs.asdict(each) for name, each in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
