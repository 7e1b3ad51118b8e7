"""How long a run will take on this machine and how much memory, by fitting small layers of random numbers.

Any strategy may be in a recipe, so nothing is assumed of its cost but that it grows as

    seconds = a + b · out · inn + c · out · inn · min(out, inn)        a, b, c >= 0

(elementwise work and products with a rank that the budget fixes; decompositions). The layers' own shapes, scaled down
by powers of two, are fitted with the recipe's own stages, as many at once as the run will have in flight, larger ones
as long as the time that was granted lasts; a shape that could be measured whole needs no law. Memory is what torch
allocates at most during a fit, at two sizes, as a line in the number of weights. What was measured is kept in the
user's cache folder, by machine, versions and stages, so that later plans need not measure again.

Calibration and pictures are not in it: their time is the 16-bit model's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy
import torch

from loraq.checkpoint import write_text
from loraq.input_statistics import InputStatistics
from loraq.match import grouped
from loraq.pipeline import LayerRecipe, layer_generator, quantize_group
from loraq.report import duration, size
from loraq.workers import Workers, in_parallel, name_of

if TYPE_CHECKING:
    from loraq.plan import Plan

GRANTED = 15.0
"""Seconds of measuring, or a little more."""
_SCALES = (1, 2, 4, 8, 16)
"""What sides are divided by."""
_STEP = 64
"""Sides are multiples of it, as models' are."""
_SPENT = 0.5
"""A probe may take so much of the time that is left, as far as is known."""
_HASHED = 2**24
"""Bytes that are hashed to know how fast that is."""
_TOKENS = 256
_BESIDE = 2**27
"""Bytes for compiled kernels and the threads' own heaps (measured, docs/notes/sizes.md)."""
_WAITING = 2 * 2
"""Bytes a weight of the largest group, in 16 bits, that was read ahead, and as much that waits to be written."""
_BOUND = (3 * 4, 2**30)
"""Bytes a weight of the largest group, and beside it, that a worker takes at most (docs/notes/sizes.md)."""


@attrs.frozen
class Shape:
    """Layers that are fitted as one: their output channels, and the input channels that they share."""

    outs: tuple[int, ...]
    inn: int

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(self.outs) * self.inn

    @property
    def cost(self) -> int:
        """The law's fastest growing term."""
        return self.weights * min(sum(self.outs), self.inn)

    def divided(self, by: int) -> Shape:
        """With sides so much shorter."""
        return Shape(tuple(_shorter(out, by) for out in self.outs), _shorter(self.inn, by))


def _shorter(side: int, by: int) -> int:
    return side if by == 1 else min(side, max(_STEP, round(side / by / _STEP) * _STEP))


@attrs.frozen
class Probe:
    """What a fit of a shape took: seconds while all workers are busy, and bytes where they were looked at."""

    shape: Shape
    seconds: float
    bytes: int = 0


@attrs.frozen(kw_only=True)
class Estimate:
    """What a run will take. `seconds` is None, and bytes are a bound, where nothing was measured.

    `worker_bytes` is what a fit takes at its peak beside the process, `total_bytes` the whole process.
    """

    seconds: float | None
    worker_bytes: int
    total_bytes: int
    workers: int
    largest: int
    """Weights of the largest layer that was measured."""
    calibrated: bool

    def told(self) -> Iterator[str]:
        """In sentences."""
        about = "at most" if self.seconds is None else "about"
        yield (
            f"memory: {about} {size(self.total_bytes)}, {size(self.worker_bytes)} of it for each of "
            f"{self.workers} {'layer' if self.workers == 1 else 'layers'} at once"
            + ("; strategies other than the shipped recipes' may take more" if self.seconds is None else "")
        )
        beside = ", calibration not counted" if self.calibrated else ""
        if self.seconds is None:
            yield "time: `loraq plan RECIPE --time` measures this machine for half a minute"
        else:
            yield f"time: about {duration(self.seconds)} of fitting on this machine{beside}"


Work = dict[LayerRecipe, Counter[Shape]]
"""How many groups of each shape there are, by what is done to them."""


def work_of(plan: Plan) -> Work:
    """What a run will fit."""
    found: Work = {}
    for component in plan.components:
        for group in grouped(component.layers):
            shape = Shape(tuple(layer.out for layer in group), group[0].inn)
            found.setdefault(group[0].recipe, Counter())[shape] += 1
    return found


def estimate(plan: Plan, workers: Workers, *, seed: int, measure: bool) -> Estimate:
    """What a run of `plan` will take, measured now if `measure` says so, else from what was measured before."""
    work = work_of(plan)
    heaviest = max((shape.weights for shapes in work.values() for shape in shapes), default=0)
    held = sum(component.component.held_bytes for component in plan.components)
    floor = _resident() + held + _BESIDE + _WAITING * heaviest
    calibrated = plan.calibration is not None
    if measure:
        _keep_missing(work, workers, seed)
    found = {recipe: _kept(recipe, workers) for recipe in work}
    if not work or not all(found.values()):
        worker = _BOUND[0] * heaviest + _BOUND[1]
        total = floor + workers.count * worker
        return Estimate(
            seconds=None,
            worker_bytes=worker,
            total_bytes=total,
            workers=workers.count,
            largest=0,
            calibrated=calibrated,
        )
    each = {recipe: {shape: _seconds(shape, found[recipe]) for shape in shapes} for recipe, shapes in work.items()}
    fits = sum(each[recipe][shape] * count for recipe, shapes in work.items() for shape, count in shapes.items())
    longest = max(seconds for shapes in each.values() for seconds in shapes.values())
    worker = max(_bytes(shape, found[recipe]) for recipe, shapes in work.items() for shape in shapes)
    return Estimate(
        seconds=max(longest, fits / workers.count) + _hashing() * (plan.source_bytes + plan.written_bytes),
        worker_bytes=worker,
        total_bytes=floor + workers.count * worker,
        workers=workers.count,
        largest=max(probe.shape.weights for probes in found.values() for probe in probes),
        calibrated=calibrated,
    )


def _resident() -> int:
    """What this process held at most so far: a run imports the same."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    # Not getrusage, whose figure a process inherits from the one that started it.
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _hashing() -> float:
    """Seconds a byte of SHA-256, by which files are known."""
    data = bytes(_HASHED)
    began = time.perf_counter()
    hashlib.sha256(data)
    return (time.perf_counter() - began) / _HASHED


def _keep_missing(work: Work, workers: Workers, seed: int) -> None:
    """Measure what is not kept, and keep it. Each recipe gets its share of the time."""
    missing = {recipe: shapes for recipe, shapes in work.items() if not _kept(recipe, workers)}
    costs = {recipe: sum(shape.cost * count for shape, count in shapes.items()) for recipe, shapes in missing.items()}
    total = sum(costs.values())
    for recipe, shapes in missing.items():
        granted = GRANTED * (0.5 / len(missing) + 0.5 * costs[recipe] / total)
        probes = _measured(recipe, shapes, workers, seed, granted)
        with contextlib.suppress(OSError):  # nowhere to keep it
            path = _path(recipe, workers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps([attrs.asdict(probe) for probe in probes]))


def _measured(recipe: LayerRecipe, shapes: Counter[Shape], workers: Workers, seed: int, granted: float) -> list[Probe]:
    """Fits of the shapes scaled down, the smallest first, then what tells most in the time; and their memory.

    That is a shape that the run has itself, the one that most of its time goes to, or else the largest.
    """
    candidates = sorted({shape.divided(by) for shape in shapes for by in _SCALES}, key=lambda shape: shape.cost)
    _fit_all(recipe, candidates[0], workers, seed)  # compiles what is compiled at its first call
    probes = [Probe(candidates[0], _fit_all(recipe, candidates[0], workers, seed))]
    left = granted
    while left > granted / 10:
        measured = {probe.shape for probe in probes}
        known = max(shape.cost for shape in measured)
        fits = [each for each in candidates if each not in measured and (each in shapes or each.cost > 2 * known)]
        fits = [each for each in fits if _seconds(each, probes) <= _SPENT * left]
        if not fits:
            break
        chosen = max(fits, key=lambda each: (shapes[each] * each.cost, each.cost))
        if len(probes) == 1:  # a law of one point says little
            chosen = fits[len(fits) // 2]
        began = time.perf_counter()
        probes.append(Probe(chosen, _fit_all(recipe, chosen, workers, seed)))
        left -= time.perf_counter() - began
    weighed = _for_memory(probes)
    return [
        attrs.evolve(probe, bytes=_peak(recipe, probe.shape, workers, seed)) if probe in weighed else probe
        for probe in probes
    ]


def _for_memory(probes: Sequence[Probe]) -> list[Probe]:
    """The two probes to look at for memory: the largest that do not take long again."""
    bearable = [probe for probe in probes if probe.seconds <= GRANTED / 3] or list(probes[:1])
    return sorted(bearable, key=lambda probe: probe.shape.weights)[-2:]


def _weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Random weights in 16 bits, of decaying spectrum: some strategies end early where there is nothing to gain."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, out in enumerate(shape.outs):
        rank = min(out, shape.inn, 64)
        strengths = torch.arange(1, rank + 1).pow(-0.6)
        left = torch.randn(out, rank, generator=generator, dtype=torch.float32) * strengths
        values = left @ torch.randn(rank, shape.inn, generator=generator, dtype=torch.float32)
        found[str(index)] = (
            (values + torch.randn(out, shape.inn, generator=generator, dtype=torch.float32)).mul_(0.02).bfloat16()
        )
    return found


def _statistics(recipe: LayerRecipe, inn: int, device: torch.device, seed: int) -> InputStatistics:
    """What calibration would give, of random tokens."""
    generator = layer_generator(seed, "estimate", device)
    tokens = torch.randn(_TOKENS, inn, generator=generator, dtype=torch.float32, device=device)
    kinds = {kind: kind.empty(inn, device, sample=_TOKENS) for kind in recipe.statistics}
    return InputStatistics({kind: empty.observed(tokens, generator) for kind, empty in kinds.items()})


def _fit_all(recipe: LayerRecipe, shape: Shape, workers: Workers, seed: int) -> float:
    """Seconds of a fit of the shape while every worker does one.

    Of a fit that is one thread on a processor, the seconds that it had the processor: what else the machine does while
    this measures does not count.
    """
    weights = _weights(shape, seed)
    alone = attrs.evolve(workers, team=type(workers.team)())
    clock = time.thread_time if workers.device.type == "cpu" and workers.threads == 1 else time.perf_counter

    def fitted(number: int, _: Any, device: torch.device) -> float:
        known = _statistics(recipe, shape.inn, device, seed)
        here = {name: weight.to(device) for name, weight in weights.items()}
        began = clock()
        quantize_group(here, recipe, seed=seed + number, statistics=known)
        return clock() - began

    found = [seconds for _, seconds in in_parallel(fitted, range(workers.count), workers=alone)]
    return float(sum(found) / len(found))


def _peak(recipe: LayerRecipe, shape: Shape, workers: Workers, seed: int) -> int:
    """The most bytes that torch holds during a fit of the shape, its weights in 16 bits among them."""
    device = workers.device
    known = _statistics(recipe, shape.inn, device, seed)
    weights = {name: weight.to(device) for name, weight in _weights(shape, seed).items()}
    own = sum(weight.nbytes for weight in weights.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(workers.threads)
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            quantize_group(weights, recipe, seed=seed, statistics=known)
            return own + torch.cuda.max_memory_allocated(device) - before
        watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with _quiet():
            watch.start()
        try:
            quantize_group(weights, recipe, seed=seed, statistics=known)
        finally:
            with _quiet():
                watch.stop()
        told: Any = watch.profiler
        events = [event for event in told.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return own + max(itertools.accumulate(changes), default=0)
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error: torch's profiler says there that it begins and ends, whatever its log level."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _seconds(shape: Shape, probes: Sequence[Probe]) -> float:
    """What the law says of a fit of the shape; what was measured, if it was."""
    same = [probe.seconds for probe in probes if probe.shape == shape]
    if same:
        return min(same)
    factors = _law(probes)
    return float(factors @ _terms(shape))


def _terms(shape: Shape) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    return numpy.array([1.0, float(shape.weights), float(shape.cost)])


def _law(probes: Sequence[Probe]) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    """The law's three factors, none negative, of least relative error; of one probe alone the steepest law."""
    best, least = numpy.array([0.0, 0.0, probes[-1].seconds / probes[-1].shape.cost]), float("inf")
    # Large layers are what the time goes to: they count more.
    shares = numpy.array([probe.shape.weights**0.5 / probe.seconds for probe in probes])
    terms = numpy.array([_terms(probe.shape) for probe in probes]) * shares[:, None]
    wanted = numpy.array([probe.seconds for probe in probes]) * shares
    if len(probes) == 1:
        return best
    subsets = itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3))
    for subset in (list(each) for each in subsets):
        if len(subset) > len(probes):
            continue
        scale = numpy.linalg.norm(terms[:, subset], axis=0)
        solution = numpy.linalg.lstsq(terms[:, subset] / scale, wanted, rcond=None)[0] / scale
        left = float(numpy.linalg.norm(terms[:, subset] @ solution - wanted))
        if (solution >= 0).all() and left < 0.999 * least:
            best, least = numpy.zeros(3), left
            best[subset] = solution
    return best


def _bytes(shape: Shape, probes: Sequence[Probe]) -> int:
    """What a fit of the shape holds at its peak: a line through two sizes, or in proportion to one."""
    known = sorted((probe for probe in probes if probe.bytes), key=lambda probe: probe.shape.weights)
    low, high = known[0], known[-1]
    if low.shape.weights == high.shape.weights:
        return int(high.bytes * max(1.0, shape.weights / high.shape.weights))
    slope = max(0.0, (high.bytes - low.bytes) / (high.shape.weights - low.shape.weights))
    return int(max(high.bytes + slope * (shape.weights - high.shape.weights), low.bytes))


def _path(recipe: LayerRecipe, workers: Workers) -> Path:
    """Where the probes of what is done to a layer are kept."""
    told = {
        "recipe": repr(recipe),
        "versions": {name: importlib.metadata.version(name) for name in ("loraq", "torch", "numba")},
        "machine": [platform.node(), platform.machine(), _processor(), name_of(workers.device)],
        "workers": [workers.count, workers.threads, len(workers.devices)],
    }
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Path(home).expanduser() / "loraq" / "estimates" / f"{digest}.json"


def _processor() -> str:
    """The processor's model, as Linux tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return platform.processor()
    return found[1] if found else platform.processor()


def _kept(recipe: LayerRecipe, workers: Workers) -> list[Probe]:
    """What was measured before; nothing where nothing sound is kept."""
    try:
        table = json.loads(_path(recipe, workers).read_text(encoding="utf-8"))
        return [
            Probe(Shape(tuple(each["shape"]["outs"]), each["shape"]["inn"]), each["seconds"], each["bytes"])
            for each in table
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
