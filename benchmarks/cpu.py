"""The packed linear on the CPU against torch's own linears: one process, interleaved calls, the best of many.

    python benchmarks/cpu.py                                 all shapes, tokens and thread counts of the table
    python benchmarks/cpu.py --shape 1152x4608 --tokens 256 --threads 1
    python benchmarks/cpu.py --json figures.json
    python benchmarks/cpu.py --model --threads 2             one denoising step of PixArt-Sigma (0.6 B, random weights)

Every figure is a whole module call: transforms, rounding of the activations, products, branch, bias, and torch's own
overhead; with one thread its own time on the processor, so that other processes matter less, with more the time that
passes. LoRaQ is W4A8 in groups of 64 with a rank-64 W8A8 branch. The others:

    bf16      torch.nn.functional.linear in bfloat16 (LoRaQ's input and output are bfloat16 for this comparison)
    float32   the same in float32
    int8      torch.ao.nn.quantized.dynamic.Linear, one scale a tensor (float32 in and out for both)
    int4pack  torch.ops.aten._weight_int4pack_mm_for_cpu, groups of 64, bfloat16 activations that are not rounded

Ratios say how many times faster LoRaQ is. `peak` is the share of this machine's VNNI peak, measured in the same
process by a loop of independent vpdpbusd, times the threads; the branch's multiplications count as work.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numba
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

import loraq
from loraq import ops
from loraq.layout import Layout
from loraq.linear import PackedLinear

backend, machines, memory, vectors = (
    importlib.import_module(f"loraq.kernels.cpu.{name}") for name in ("backend", "machines", "memory", "vectors")
)

SHAPES = ("1152x1152", "1152x4608", "4608x1152", "2240x2240", "2240x11200")
TOKENS = (1, 16, 256, 1024, 4096)
RANK = 64
GROUP = 64
COLUMNS = ("bf16", "bf16, no branch", "float32", "int8", "int8, no branch", "int4pack", "hadamard")


@attrs.frozen
class Figure:
    """One cell: a shape (inn, out), tokens and threads; seconds by contender, and the VNNI peak on those threads."""

    inn: int
    out: int
    tokens: int
    threads: int
    peak: float
    seconds: Mapping[str, float]

    def ratio(self, other: str, mine: str) -> float:
        """How many times faster than `other` `mine` is; not a number where `other` was left out."""
        return self.seconds.get(other, float("nan")) / self.seconds[mine]

    def ratios(self) -> dict[str, float]:
        """The columns of the table."""
        return {
            "bf16": self.ratio("bf16", "loraq bf16"),
            "bf16, no branch": self.ratio("bf16", "loraq bf16, no branch"),
            "float32": self.ratio("float32", "loraq"),
            "int8": self.ratio("int8", "loraq"),
            "int8, no branch": self.ratio("int8", "loraq, no branch"),
            "int4pack": self.ratio("int4pack", "loraq bf16"),
            "hadamard": self.ratio("bf16", "loraq bf16, hadamard"),
        }

    @property
    def share(self) -> float:
        """The share of the VNNI peak, with the branch, float32 in and out."""
        return (
            2 * self.tokens * (self.inn * self.out + RANK * (self.inn + self.out)) / self.seconds["loraq"] / self.peak
        )


def random_layer(inn: int, out: int, rank: int, transform: str | None = None) -> PackedLinear:
    """A packed layer with random weights, bias included."""
    plain: dict[str, Any] = {
        "out": out,
        "inn": inn,
        "rank": rank,
        "main": {"format": "int4", "group": GROUP},
        "activation": {"format": "int8", "group": GROUP},
        "packing": {"strategy": "rows"},
        "transforms": [] if transform is None else [{"strategy": transform}],
    }
    if rank:
        branch = {"format": "int8", "group": GROUP}
        plain |= {"down": branch, "up": branch, "branch_activation": {"format": "int8", "group": GROUP}}
    layout = Layout.from_plain(plain)
    tensors: dict[str, Tensor] = {}
    for name, stored in layout.stored().items():
        if name.endswith("scales"):
            tensors[name] = (torch.rand(stored.shape) * 0.01).bfloat16().view(torch.int16)
        else:
            tensors[name] = torch.randint(0, 256, stored.shape, dtype=torch.uint8).view(getattr(torch, stored.dtype))
    return PackedLinear(layout, tensors, torch.randn(out))


def contenders(inn: int, out: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    weight, bias, single = torch.randn(out, inn), torch.randn(out), torch.randn(tokens, inn)
    half = single.bfloat16()
    full, alone = random_layer(inn, out, RANK), random_layer(inn, out, 0)
    rotated = random_layer(inn, out, RANK, "hadamard")
    plain, plain_bias = weight.bfloat16(), bias.bfloat16()
    linear = torch.nn.Linear(inn, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic: Any = torch.ao.quantization.quantize_dynamic
        int8 = dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)[0]
    found: dict[str, Callable[[], Tensor]] = {
        "loraq": lambda: full(single),
        "int8": lambda: int8(single),
        "float32": lambda: torch.nn.functional.linear(single, weight, bias),
        "loraq, no branch": lambda: alone(single),
        "loraq bf16": lambda: full(half),
        "bf16": lambda: torch.nn.functional.linear(half, plain, plain_bias),
        "loraq bf16, no branch": lambda: alone(half),
        "loraq bf16, hadamard": lambda: rotated(half),
    }
    if out % 64 == 0:
        codes = torch.randint(0, 16, (out, inn), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(inn // GROUP, out, 2).bfloat16()
        found["int4pack"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, GROUP, scales)
    return found


_SHORTEST = 0.002
"""Seconds that one timing takes at least."""


def best(calls: Mapping[str, Callable[[], Tensor]], seconds: float) -> dict[str, float]:
    """The best time of each call, taken in turn until all have had `seconds`, at least three turns.

    Short calls are timed by the batch: a thread's processor time may be counted in steps longer than one of them.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        batches = {}
        for name, function in calls.items():
            function()
            began = time.perf_counter()
            function()
            batches[name] = max(1, round(_SHORTEST / max(time.perf_counter() - began, 1e-9)))
        found, spent, turns = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, 0.0), 0
        while turns < 3 or min(spent.values()) < seconds:
            for name, function in calls.items():
                if turns >= 3 and spent[name] >= max(seconds, 3 * found[name]):
                    continue
                began = clock()
                for _ in range(batches[name]):
                    function()
                took = clock() - began
                found[name], spent[name] = min(found[name], took / batches[name]), spent[name] + took
            turns += 1
    return found


def _dots(typing_context: Any, turns: Any) -> Any:
    """`turns` times 16 independent vpdpbusd of 512 bits; gives a number that depends on all."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        vector, long = ir.VectorType(ir.IntType(32), 16), ir.IntType(64)
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        lane = ir.Constant(ir.IntType(32), 0)
        start = builder.insert_element(ir.Constant(vector, None), builder.trunc(arguments[0], ir.IntType(32)), lane)
        builder.branch(loop)
        builder.position_at_end(loop)
        turn, sums = builder.phi(long), [builder.phi(vector) for _ in range(16)]
        turn.add_incoming(ir.Constant(long, 0), before)
        following = builder.add(turn, ir.Constant(long, 1))
        turn.add_incoming(following, loop)
        for number, each in enumerate(sums):  # sums that are alike would be computed once
            each.add_incoming(ir.Constant(vector, [number] * 16), before)
            dot = vectors.instruction(builder, "llvm.x86.avx512.vpdpbusd.512", vector, each, start, start)
            each.add_incoming(dot, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[0]), loop, after)
        builder.position_at_end(after)
        total = sums[0]
        for each in sums[1:]:
            total = builder.add(total, each)
        return builder.sext(builder.extract_element(total, lane), long)

    return types.int64(types.int64), generate


dots: Any = memory.intrinsic(_dots)


def vnni_peak() -> float:
    """Operations a second, two a multiplication, of vpdpbusd on one thread; not a number where there is none."""
    if machines.machine().name != "avx512-vnni":
        return float("nan")
    turns = 500_000  # a few milliseconds

    def turning() -> int:
        return int(dots(turns))

    loop: Any = numba.njit(turning)
    loop()
    found = float("inf")
    for _ in range(100):
        began = time.thread_time()
        loop()
        found = min(found, time.thread_time() - began)
    return turns * 16 * 128 / found


def measure(shape: str, tokens: int, threads: int, peak: float, seconds: float) -> Figure:
    """One cell of the table."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    inn, out = (int(each) for each in shape.split("x"))
    return Figure(inn, out, tokens, threads, peak, best(contenders(inn, out, tokens), seconds))


def steps(batch: int, tokens: int, threads: int) -> dict[str, float]:
    """Seconds of one denoising step of a PixArt-Sigma of true size, in bfloat16 and with its blocks' linears packed."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    side = 2 * int(tokens**0.5)
    options = {"num_layers": 28, "sample_size": side, "in_channels": 4, "out_channels": 8, "caption_channels": 4096}
    maker: Any = PixArtTransformer2DModel
    model = maker(**options, use_additional_conditions=False).bfloat16().eval()
    packed = copy.deepcopy(model)
    # Layers of random codes would do for a layer alone; here their large outputs would double the time of each GELU.
    quick = [
        loraq.stage("pre_transform", "hadamard"),
        loraq.stage("main_quantizer", "rtn", weight="int4", activation="int8"),
        loraq.stage("low_rank", "loraq_fast", steps=1, rank=RANK),
        loraq.stage("branch_quantizer", "rtn", weight="int8", activation="int8"),
    ]
    loraq.Pipeline(quick, threads=1).quantize(packed)
    latents = torch.randn(batch, 4, side, side).bfloat16()
    given = {
        "encoder_hidden_states": torch.randn(batch, 120, 4096).bfloat16(),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return best({"bf16": lambda: model(latents, **given)[0], "loraq": lambda: packed(latents, **given)[0]}, 10.0)


def heading() -> str:
    """The table's first line."""
    return (
        f"{'inn x out':>11} {'tokens':>6} {'threads':>7} {'ms':>9} "
        + " ".join(f"{each:>15}" for each in COLUMNS)
        + "   peak"
    )


def line(figure: Figure) -> str:
    """One line of the table."""
    ratios = figure.ratios()
    cells = " ".join(f"{ratios[each]:15.2f}" for each in COLUMNS)
    place = f"{f'{figure.inn}x{figure.out}':>11} {figure.tokens:6} {figure.threads:7}"
    return f"{place} {figure.seconds['loraq'] * 1e3:9.3f} {cells} {figure.share:6.0%}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="INNxOUT (repeatable)")
    parser.add_argument("--tokens", action="append", type=int, help="repeatable")
    parser.add_argument("--threads", action="append", type=int, help="repeatable; 1 and 2 by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each contender of a cell runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    there = [each.name for each in machines.MACHINES if machines.runs(each)]
    parser.add_argument("--machine", choices=there, help="one of the kernel's machines instead of the fastest here")
    parser.add_argument("--model", action="store_true", help="time a whole denoising step instead")
    options = parser.parse_args()
    if options.machine:
        kernel = backend.CpuKernel(options.machine)
        ops.kernel_for = lambda layout, device: kernel  # type: ignore[assignment]  # without its cache
    chosen = ops.kernel_for(random_layer(64, 32, 0).layout, "cpu")
    if chosen is None:
        raise SystemExit(
            f"the CPU kernel is not registered; torch.ops.loraq.linear would run {chosen or 'the reference'}"
        )
    if options.model:
        for threads in options.threads or (1, 2):
            for batch, tokens in ((1, 256), (2, 256), (1, 1024)):
                found = steps(batch, tokens, threads)
                times = f"bf16 {found['bf16']:.3f} s, LoRaQ {found['loraq']:.3f} s"
                print(
                    f"batch {batch}, {tokens} tokens, {threads} threads: {times}: {found['bf16'] / found['loraq']:.2f}x"
                )
        return
    figures, single = [], vnni_peak()
    for threads in options.threads or (1, 2):
        peak = single * threads
        name = machines.machine(options.machine).name
        print(f"{name}, {threads} threads, VNNI peak {peak / 1e9:.0f} GOPS\n{heading()}", flush=True)
        for shape in options.shape or SHAPES:
            for tokens in options.tokens or TOKENS:
                figures.append(measure(shape, tokens, threads, peak, options.seconds))
                print(line(figures[-1]), flush=True)
    if options.json:
        rows = [{**attrs.asdict(each), "share": each.share, "ratios": each.ratios()} for each in figures]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
