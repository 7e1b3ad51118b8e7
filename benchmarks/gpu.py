"""The packed linear on a CUDA GPU: every kernel checked against the torch reference, then timed against torch's bf16.

    python benchmarks/gpu.py                                  all shapes and tokens of the table, in under 9 minutes
    python benchmarks/gpu.py --prebuilt cubins                with cubins of `python -m loraq.kernels.cuda.build`
    python benchmarks/gpu.py --shape 1152x4608 --tokens 256 --layer w4a8 --json figures.json
    python benchmarks/gpu.py --emulate --shape 64x64 --tokens 3     the checks alone, in the emulator, without a GPU

Each case is a layer of inn x out with so many tokens, in bfloat16, with a bias:

    w4a8           main int4 with int8 activations in groups of 64, no branch
    w4a8-branch    the same with a rank-64 branch, 8-bit weights and activations
    w4x2a8         main int4x2 (two-level scales) with int8 activations, one scale a token, and the rank-64 branch
    w4a4-rotated   as the shipped recipes have it: int4 activations, signed Hadamard rotation, a rank-118 branch of 4
                   bits with 8-bit activations

(Not called cuda.py, which would hide the package cuda from torch.)

Checked: outputs and scratch memory are poisoned, inputs and weights are random and new, and every output must be the
reference's, bit for bit. Timed: calls of the whole layer by CUDA events, median of `--repeats` runs through as many
copies of layer and input as exceed twice the second-level cache; `eager` as Python calls it, `graph` replaying a CUDA
graph of the same calls. bf16 is torch.nn.functional.linear, the same way in the same process. Ratios say how many times
faster LoRaQ is. Figures so far are written to --json after every case, whatever comes next.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from loraq import ops
from loraq.layout import Layout

backend, device_module, driver, emulated = (
    importlib.import_module(f"loraq.kernels.cuda.{name}") for name in ("backend", "device", "driver", "emulated")
)

SHAPES = ("1152x1152", "1152x4608", "2240x2240", "2240x11200", "3072x12288")
TOKENS = (1, 16, 256, 1024, 4096)
MOST_COPIES = 48
_ROTATED = ({"strategy": "hadamard", "signs": True},)
_TOKEN = {"format": "int8", "group": "token"}
LAYERS: dict[str, dict[str, Any]] = {
    "w4a8": {"activation": "int8", "rank": 0, "branch": "int8", "transforms": ()},
    "w4a8-branch": {"activation": "int8", "rank": 64, "branch": "int8", "transforms": ()},
    "w4x2a8": {"main": "int4x2", "activation": _TOKEN, "rank": 64, "branch": "int8", "transforms": ()},
    "w4a4-rotated": {"activation": "int4", "rank": 118, "branch": "int4", "transforms": _ROTATED},
}


@attrs.frozen
class Case:
    """A layer and its input: what is checked and timed."""

    layer: str
    inn: int
    out: int
    tokens: int

    def layout(self) -> Layout:
        """The layer's layout; a rank no larger than the layer."""
        chosen = LAYERS[self.layer]
        rank = min(chosen["rank"], self.inn, self.out)
        plain: dict[str, Any] = {
            "out": self.out,
            "inn": self.inn,
            "rank": rank,
            "main": {"format": chosen.get("main", "int4"), "group": 64},
            "activation": chosen["activation"],
            "packing": {"strategy": "rows"},
            "transforms": list(chosen["transforms"]),
        }
        if rank:
            plain |= {name: {"format": chosen["branch"], "group": 64} for name in ("down", "up")}
            plain["branch_activation"] = "int8"
        return Layout.from_plain(plain)


@attrs.frozen
class Figure:
    """What was found for a case; times in microseconds, None where nothing was timed."""

    case: Case
    equal: float
    """The share of outputs that are the reference's bit for bit; 1 where all is well."""
    worst: float
    """The largest difference from the reference, relative to its largest output."""
    eager: float | None = None
    graph: float | None = None
    bf16_eager: float | None = None
    bf16_graph: float | None = None

    @property
    def right(self) -> bool:
        """Whether the kernels compute what they should."""
        return self.equal == 1


class Clock(Protocol):
    """Times calls: seconds of a run through all of them, as Python calls them and as a graph; None where not done."""

    def __call__(self, calls: Sequence[Callable[[], Tensor]]) -> tuple[float | None, float | None]: ...


@attrs.frozen
class GpuClock:
    """CUDA events around the calls, the median of `repeats` runs after a warm-up."""

    repeats: int

    def __call__(self, calls: Sequence[Callable[[], Tensor]]) -> tuple[float | None, float | None]:
        def all_calls() -> None:
            for call in calls:
                call()

        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # graphs want a warm-up beside the default stream
            all_calls()
            all_calls()
        torch.cuda.current_stream().wait_stream(stream)
        eager = self._median(all_calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        return eager, self._median(graph.replay)

    def _median(self, run: Callable[[], Any]) -> float:
        run()
        times: list[float] = []
        event: Any = torch.cuda.Event
        for _ in range(self.repeats):
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return statistics.median(times)


def no_clock(calls: Sequence[Callable[[], Tensor]]) -> tuple[float | None, float | None]:
    """No times: the emulator has none that mean anything."""
    del calls
    return None, None


class Poisoning(device_module.AbstractDevice):  # type: ignore[misc,name-defined]
    """A device whose fresh memory is full of large numbers, so that what no kernel writes is seen."""

    def __init__(self, device: Any) -> None:
        self._device = device

    @property
    def architecture(self) -> str:
        """The device's."""
        return str(self._device.architecture)

    def launch(self, program: Any, arguments: Any) -> Any:
        return self._device.launch(program, arguments)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        made: Tensor = self._device.empty(shape, dtype, device)
        made.view(torch.uint8).fill_(0x7E)
        return made


def stored(layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
    """Random stored tensors of a layout whose codes use all their bits, on the generator's device."""
    tensors = {}
    for name, described in layout.stored().items():
        if described.dtype == "int16":
            scales = torch.rand(described.shape, generator=generator, device=generator.device) + 0.5
            tensors[name] = (scales / (4 * math.sqrt(layout.inn))).bfloat16().view(torch.int16)
            continue
        reached = 16 if name.endswith(".multipliers") else 256
        octets = torch.randint(0, reached, described.shape, generator=generator, device=generator.device)
        tensors[name] = octets.to(torch.uint8).view(getattr(torch, described.dtype))
    return tensors


def inputs(case: Case, generator: torch.Generator) -> Tensor:
    """Random activations with some outlier channels, (tokens, inn) bfloat16."""
    input = torch.randn(case.tokens, case.inn, generator=generator, device=generator.device)
    input[:, :: max(1, case.inn // 7)] *= 20
    return input.bfloat16()


def check(case: Case, device: Any, generator: torch.Generator) -> Figure:
    """Compare one call with the reference."""
    layout = case.layout()
    tensors, input = stored(layout, generator), inputs(case, generator)
    bias = torch.randn(case.out, generator=generator, device=generator.device).bfloat16()
    output = backend.CudaKernel(Poisoning(device)).linear(input, tensors, bias, layout).float()
    wanted = ops.reference(input, tensors, bias, layout).float()
    worst = float((output - wanted).abs().max() / wanted.abs().max())
    return Figure(case, float((output == wanted).float().mean()), worst)


def measure(case: Case, device: Any, clock: Clock, generator: torch.Generator, cache_bytes: int) -> dict[str, Any]:
    """Times of the layer and of torch's bf16 linear, a call, in microseconds."""
    layout = case.layout()
    kernel = backend.CudaKernel(device)
    weight_bytes, input_bytes = case.inn * case.out, 2 * case.tokens * (case.inn + case.out)
    times: dict[str, Any] = {}
    bias = torch.randn(case.out, generator=generator, device=generator.device).bfloat16()

    def copies(weight_bytes: float) -> int:
        return max(1, min(MOST_COPIES, math.ceil(2 * cache_bytes / (weight_bytes + input_bytes))))

    def timed(name: str, calls: list[Callable[[], Tensor]]) -> None:
        eager, graph = clock(calls)
        times[f"{name}eager"] = None if eager is None else eager / len(calls) * 1e6
        times[f"{name}graph"] = None if graph is None else graph / len(calls) * 1e6

    def packed() -> Callable[[], Tensor]:
        tensors, input = stored(layout, generator), inputs(case, generator)
        return lambda: kernel.linear(input, tensors, bias, layout)

    def plain() -> Callable[[], Tensor]:
        weight = torch.randn(case.out, case.inn, generator=generator, device=generator.device).bfloat16()
        input = inputs(case, generator)
        return lambda: torch.nn.functional.linear(input, weight, bias)

    timed("", [packed() for _ in range(copies(0.53 * weight_bytes))])
    timed("bf16_", [plain() for _ in range(copies(2 * weight_bytes))])
    return times


def table(figures: Sequence[Figure]) -> Iterator[str]:
    """The lines of the table."""
    yield (
        f"{'layer':14}{'inn x out':>13}{'tokens':>7}  {'check':12}{'eager us':>10}{'graph us':>10}"
        f"{'bf16 us':>10}{'graph us':>10}{'ratio':>8}{'graph':>8}"
    )
    for figure in figures:
        case = figure.case
        word = "equal" if figure.right else f"{figure.equal:.4%}"
        numbers = (figure.eager, figure.graph, figure.bf16_eager, figure.bf16_graph)
        cells = "".join(f"{'-' if each is None else f'{each:.1f}':>10}" for each in numbers)
        ratios = "".join(
            f"{'-' if mine is None or other is None else f'{other / mine:.2f}':>8}"
            for mine, other in ((figure.eager, figure.bf16_eager), (figure.graph, figure.bf16_graph))
        )
        yield f"{case.layer:14}{f'{case.inn}x{case.out}':>13}{case.tokens:7}  {word:12}{cells}{ratios}"


def write(path: Path | None, machine: str, figures: Sequence[Figure], left: int) -> None:
    """All that is known so far, as JSON."""
    if path is not None:
        rows = [attrs.asdict(figure) for figure in figures]
        path.write_text(json.dumps({"machine": machine, "figures": rows, "cases_left": left}, indent=1) + "\n")


def run(
    cases: Sequence[Case],
    device: Any,
    clock: Clock,
    generator: torch.Generator,
    *,
    seed: int,
    cache_bytes: int,
    seconds: float,
    json_path: Path | None,
    machine: str,
) -> list[Figure]:
    """Check and time the cases in order until the time is up."""
    figures: list[Figure] = []
    end = time.monotonic() + seconds
    for place, case in enumerate(cases):
        if time.monotonic() > end:
            print(f"out of time: {len(cases) - place} cases were left out, from {cases[place]} on")
            break
        # Of the case as well, so that one alone has the numbers that it has among all.
        generator.manual_seed((seed + zlib.crc32(repr(case).encode())) % 2**31)
        figure = check(case, device, generator)
        if clock is not no_clock:
            figure = attrs.evolve(figure, **measure(case, device, clock, generator, cache_bytes))
        figures.append(figure)
        write(json_path, machine, figures, len(cases) - place - 1)
        lines = list(table([figure]))
        print("\n".join(lines if place == 0 else lines[1:]), flush=True)
    return figures


def cases_of(shapes: Sequence[str], tokens: Sequence[int], layers: Sequence[str]) -> list[Case]:
    """Every combination, the layers one after the other."""
    sizes = [tuple(int(side) for side in shape.split("x")) for shape in shapes]
    return [Case(layer, inn, out, count) for layer in layers for inn, out in sizes for count in tokens]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a kernel is wrong, 2 where it cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="inn x out, such as 1152x4608; may be repeated")
    parser.add_argument("--tokens", action="append", type=int, help="may be repeated")
    parser.add_argument("--layer", action="append", choices=list(LAYERS), help="may be repeated")
    parser.add_argument("--prebuilt", type=Path, help="a folder of cubins; no compiler is needed then")
    parser.add_argument(
        "--wgmma", action="store_true", help="Hopper's own instruction for all layers, not w4x2a8 alone"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8.5, help="no case is begun later than this")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--emulate", metavar="ARCH", nargs="?", const="90", help="check in the emulator, without a GPU")
    given = parser.parse_args(arguments)
    cases = cases_of(given.shape or SHAPES, given.tokens or TOKENS, given.layer or list(LAYERS))
    seed = time.time_ns() % 2**31 if given.seed is None else given.seed
    if given.prebuilt is not None:
        os.environ["LORAQ_CUDA_PREBUILT"] = str(given.prebuilt)
    if given.wgmma:
        os.environ["LORAQ_CUDA_WGMMA"] = "1"
    device: Any
    clock: Clock = no_clock
    if given.emulate is not None:
        device, where, machine, cache_bytes = emulated.EmulatedDevice(given.emulate), "cpu", "emulator", 0
    else:
        reason = driver.refusal()
        if reason is not None:
            print(f"loraq: {reason}", file=sys.stderr)
            return 2
        properties = torch.cuda.get_device_properties(0)
        os.environ["LORAQ_CUDA_CHECK"] = "0"  # here every case is checked, and a wrong kernel is timed all the same
        device, where, clock = driver.gpu(0), "cuda", GpuClock(given.repeats)
        machine, cache_bytes = f"{properties.name}, torch {torch.__version__}", properties.L2_cache_size
    print(f"{machine}, sm_{device.architecture} code, seed {seed}")
    generator = torch.Generator(where)
    limits: dict[str, Any] = {
        "seed": seed,
        "cache_bytes": cache_bytes,
        "seconds": 60 * given.minutes,
        "json_path": given.json,
    }
    figures = run(cases, device, clock, generator, machine=machine, **limits)
    wrong = [figure for figure in figures if not figure.right]
    print(f"{len(figures) - len(wrong)} of {len(figures)} cases equal to the reference, bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
