"""One suite a contract, run against every registered strategy by test_contracts.py.

A strategy's author calls the suite of the contract it implements: `quantizer(MyQuantizer())` raises AssertionError
where a promise of loraq/contracts.py is broken.
"""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import torch
from PIL import Image

from loraq import formats
from loraq.contracts import (
    AbstractCalibrated,
    AbstractFormat,
    AbstractKernel,
    AbstractLookup,
    AbstractLowRank,
    AbstractMetric,
    AbstractPacking,
    AbstractParticular,
    AbstractPreTransform,
    AbstractQuantizer,
    AbstractSetMetric,
)
from loraq.factors import deviation
from loraq.layer import Coded, LayerContext, Part
from loraq.layout import Layout
from loraq.picture_set import PictureSet
from matrices import calibrated_context, context, seeded, trained

SHAPES = ((1, 1), (3, 5), (16, 64), (65, 130), (64, 200))


def is_options_class(cls: type) -> None:
    """A strategy is a frozen attrs class whose options have defaults, values and can be compared."""
    assert attrs.has(cls), f"{cls.__name__} is no attrs class"
    instance = cls()
    assert instance == cls()
    assert hash(instance) == hash(cls())
    for field in attrs.fields(cls):
        try:
            setattr(instance, field.name, None)
        except attrs.exceptions.FrozenInstanceError:
            continue
        raise AssertionError(f"{cls.__name__}.{field.name} can be changed")


def number_format(format: AbstractFormat) -> None:
    """Codes fit their bits, parts are what was announced, zeros stay zeros, and encoding is idempotent enough."""
    for rows, columns in SHAPES:
        for group in (1, 3, 64, columns):
            values = seeded(rows, columns, seed=rows + columns)
            values[0] = 0
            coded = format.encode(values, group)  # Coded checks names, shapes and dtypes against format.parts
            decoded = coded.decode()
            assert decoded.shape == (rows, columns)
            assert decoded.dtype == torch.float32
            assert torch.equal(decoded[0], torch.zeros(columns))
            for name, part in format.parts(rows, columns, group).items():
                _fits_bits(coded.parts[name], part)
            nearest = (values - decoded).abs().max()
            assert nearest <= values.abs().max(), "rounding is worse than giving zero"
            _points_are_what_decodes(format, coded, values)
            if isinstance(format, AbstractLookup):
                _lookup_is_what_decodes(format, coded)


def _lookup_is_what_decodes(format: AbstractLookup, coded: Coded) -> None:
    """A table's value times the scale, plus the offset, is the decoded value, bit for bit."""
    found = format.lookup(coded)
    rows, columns = coded.shape
    assert found.codes.shape == (rows, columns)
    assert found.codes.dtype == torch.uint8
    assert len(found.values) <= 256
    groups = torch.arange(columns) // coded.group
    values = found.values[found.codes.long()] * found.scales[:, groups]
    if found.offsets is not None:
        values = values + found.offsets[:, groups]
    assert torch.equal(values, coded.decode())


def _points_are_what_decodes(format: AbstractFormat, coded: Coded, values: torch.Tensor) -> None:
    """Decoded values lie on the points of their scales, which choosing codes by point leaves as they are."""
    if isinstance(format, formats.FloatFormat):
        return
    rows, columns = coded.shape
    before = {name: tensor.clone() for name, tensor in coded.parts.items()}
    points = format.points(coded)
    assert points.shape[:2] == (rows, -(-columns // coded.group))
    assert points.dtype == torch.float32
    assert (points.diff(dim=-1) >= 0).all(), "points ascend"
    chosen = torch.randint(points.shape[-1], (rows, columns), generator=torch.Generator().manual_seed(columns))
    of_column = points.repeat_interleave(min(coded.group, columns), dim=1)[:, :columns]
    assert torch.equal(
        format.with_points(coded, chosen).decode(), of_column.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    )
    assert torch.equal(formats.recoded(coded.decode(), coded).decode(), coded.decode())
    errors = (values - formats.recoded(values, coded).decode()).abs()
    least = (values.unsqueeze(-1) - of_column).abs().amin(dim=-1)
    assert (errors <= least * (1 + 1e-5) + 1e-6 * values.abs().max()).all(), "another point is nearer"
    assert all(torch.equal(before[name], tensor) for name, tensor in coded.parts.items()), "its argument was changed"


def _fits_bits(tensor: torch.Tensor, part: Part) -> None:
    if tensor.dtype == torch.int8:
        assert int(tensor.min()) >= -(2 ** (part.bits - 1))
        assert int(tensor.max()) < 2 ** (part.bits - 1)
    elif tensor.dtype == torch.uint8:
        assert int(tensor.max()) < 2**part.bits


def quantizer(strategy: AbstractQuantizer) -> None:
    """encode and round give the announced format and group, from the argument alone, which stays as it is."""
    for rows, columns in SHAPES:
        weight = trained(rows, columns, seed=3)
        before = weight.clone()
        known = calibrated_context(columns)
        coded = strategy.encode(weight, known)
        again = strategy.encode(weight, calibrated_context(columns))
        rounded = strategy.round(weight)
        guessed = strategy.round(weight * 1.01, rounded)
        assert torch.equal(weight, before), "encode or round changed its argument"
        for each in (coded, rounded, guessed):
            assert each.format == strategy.format
            assert each.group == strategy.group_for(columns)
            assert each.shape == (rows, columns)
            assert torch.isfinite(each.decode()).all()
        assert all(torch.equal(coded.parts[name], again.parts[name]) for name in coded.parts), "encode is not pure"
        assert deviation(weight - coded.decode(), known) <= deviation(weight, known)
        assert deviation(weight - rounded.decode()) <= deviation(weight)
    zeros = torch.zeros(4, 70)
    assert torch.equal(strategy.encode(zeros, calibrated_context(70)).decode(), zeros)


def told(inn: int, *strategies: object) -> LayerContext:
    """A fresh context with statistics of an input of `inn` channels where one of the strategies asks for some."""
    asks = any(isinstance(each, AbstractCalibrated) and each.statistics for each in strategies)
    return calibrated_context(inn) if asks else context()


def pre_transform(strategy: AbstractPreTransform) -> None:
    """The layer's function is unchanged to float rounding, and the online part is what was announced."""
    for out, inn in SHAPES:
        weight, input = trained(out, inn, seed=5), seeded(7, inn, seed=6)
        weight[:, 0] = 0
        before = weight.clone()
        online = strategy.prepare(weight, told(inn, strategy))
        again = strategy.prepare(weight, told(inn, strategy))
        announced = strategy.parts(inn)
        assert online.keys() == announced.keys() == again.keys()
        for name, part in announced.items():
            assert tuple(online[name].shape) == part.shape
            assert str(online[name].dtype) == f"torch.{part.dtype}"
            assert torch.equal(online[name], again[name]), "prepare is not a pure function"
            _fits_bits(online[name], part)
        assert torch.equal(weight, before), "prepare changed its argument"
        expected = input.double() @ weight.double().T
        found = strategy.input(input, online).double() @ strategy.weight(weight, online).double().T
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max() + 1e-30), rtol=1e-4)


def low_rank(
    strategy: AbstractLowRank, main: AbstractQuantizer, branch: AbstractQuantizer, shapes: object = SHAPES
) -> None:
    """The fit has the announced shapes and formats, is a pure function, and is never worse than no branch."""
    for out, inn in shapes:  # type: ignore[attr-defined]
        weight = trained(out, inn, seed=7)
        before = weight.clone()
        known = told(inn, strategy, main, branch)
        alone = deviation(weight - main.encode(weight, known).decode(), known)
        for rank in {0, 1, min(out, inn, 9)} if strategy.has_branch else {0}:
            fit = strategy.fit(weight, main, branch, rank, told(inn, strategy, main, branch))
            again = strategy.fit(weight, main, branch, rank, told(inn, strategy, main, branch))
            assert torch.equal(weight, before), "fit changed its argument"
            assert fit.rank == rank
            assert (fit.main.format, fit.main.group) == (main.format, main.group_for(inn))
            if rank:
                assert (fit.down.format, fit.down.group) == (branch.format, branch.group_for(inn))
                assert (fit.up.format, fit.up.group) == (branch.format, branch.group_for(rank))
            assert deviation(weight - fit.decode(), known) <= alone * (1 + 1e-6)
            assert torch.equal(fit.decode(), again.decode()), "fit is not a pure function"


def packing(strategy: AbstractPacking) -> None:
    """Packing announces shape and dtype, stores integers, and comes back exactly."""
    parts = [Part.codes(5, columns, bits) for columns in (1, 3, 8, 65) for bits in (2, 3, 4, 5, 6, 7, 8)]
    parts += [Part.codes(5, 7, bits, signed=False) for bits in (1, 4, 8)]
    parts += [Part((4, 3), dtype, width) for dtype, width in (("bfloat16", 16), ("float16", 16), ("float32", 32))]
    for part in parts:
        tensor = _random(part)
        packed = strategy.pack(tensor, part)
        announced = strategy.stored(part)
        assert tuple(packed.shape) == announced.shape
        assert str(packed.dtype) == f"torch.{announced.dtype}"
        assert not packed.dtype.is_floating_point, "a loader would cast it"
        back = strategy.unpack(packed, part)
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def _random(part: Part) -> torch.Tensor:
    generator = torch.Generator().manual_seed(part.bits)
    dtype = getattr(torch, part.dtype)
    if dtype.is_floating_point:
        return torch.randn(part.shape, generator=generator).to(dtype)
    low = -(2 ** (part.bits - 1)) if part.dtype == "int8" else 0
    return torch.randint(low, low + 2**part.bits, part.shape, generator=generator).to(dtype)


def kernel(backend: AbstractKernel, tensors: dict[str, torch.Tensor], layout: Layout) -> None:
    """A backend computes what the reference computes, to float rounding, wherever it does not refuse.

    Its output has the input's dtype and owns its memory, nothing it is given changes, it gives the same bits each time,
    a token's output does not depend on its neighbours, and stored tensors that were written to are read anew.
    """
    from loraq import ops

    refusal = backend.refusal(layout)
    if refusal is not None:
        assert refusal, "a refusal is a sentence"
        return
    bias = seeded(layout.out, seed=1)
    for tokens in (1, 3, 130):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            input = seeded(tokens, layout.inn, seed=tokens).to(dtype)
            before = input.clone()
            output = backend.linear(input, tensors, bias, layout)
            expected = ops.reference(input, tensors, bias, layout)
            assert output.dtype == dtype
            assert output.shape == (tokens, layout.out)
            ulp = max(torch.finfo(dtype).eps, 1e-5)
            assert torch.allclose(output.float(), expected.float(), rtol=ulp, atol=1e-5 * float(expected.abs().max()))
            assert torch.equal(input, before), "the input was changed"
            assert torch.equal(backend.linear(input, tensors, bias, layout), output), "not the same twice"
            alone = backend.linear(input[-1:], tensors, bias, layout)
            assert torch.allclose(alone, output[-1:], rtol=ulp, atol=1e-5)
    written = {name: tensor.clone() for name, tensor in tensors.items()}
    backend.linear(input, written, None, layout)
    for name, tensor in tensors.items():
        if "scales" in name:
            written[name].copy_(tensor.flip(0))
    expected = ops.reference(input, written, None, layout)
    assert torch.allclose(backend.linear(input, written, None, layout), expected, rtol=1e-2, atol=1e-2)


def metric(metric: AbstractMetric | AbstractSetMetric, folder: Path) -> None:
    """A finite figure, the same each time; no picture, and no set, is nearer to the original's than an equal one."""
    assert metric.better in ("higher", "lower")
    assert isinstance(metric.unit, str)
    reason = metric.refusal()
    if reason is not None:
        assert reason, "a refusal is a sentence"
        return
    if isinstance(metric, AbstractSetMetric):
        set_metric(metric, folder)
        return
    prompt = "a small red ring on white"
    noise = [seeded(64, 64 * 3, seed=seed).sigmoid().mul(255).byte().reshape(64, 64, 3) for seed in (1, 2)]
    original, other = (Image.fromarray(each.numpy()) for each in noise)
    before = [picture.tobytes() for picture in (original, other)]
    figures = [metric.measure(picture, original, prompt) for picture in (other, original, other)]
    assert all(isinstance(figure, float) and math.isfinite(figure) for figure in figures)
    assert figures[0] == figures[2]
    if metric.paired:
        assert figures[1] > figures[0] if metric.better == "higher" else figures[1] < figures[0]
    assert before == [picture.tobytes() for picture in (original, other)]


def set_metric(metric: AbstractSetMetric, folder: Path) -> None:
    """The part of a metric of sets; six pictures are compared with six others."""
    assert metric.enough > 0
    paths = [folder / f"{seed}.png" for seed in range(12)]
    for seed, path in enumerate(paths):
        Image.fromarray(seeded(64, 64 * 3, seed=seed).sigmoid().mul(255).byte().reshape(64, 64, 3).numpy()).save(path)
    drawn, others, prompts = tuple(paths[:6]), tuple(paths[6:]), ("a small red ring on white",) * 6
    far = PictureSet(drawn=drawn, originals=others, references=others, prompts=prompts)
    near = PictureSet(drawn=drawn, originals=drawn, references=drawn, prompts=prompts)
    if isinstance(metric, AbstractParticular) and metric.objection(far) is not None:
        return
    figures = [metric.measure(pictures) for pictures in (far, near, far)]
    assert all(isinstance(figure, float) and math.isfinite(figure) for figure in figures)
    assert figures[0] == figures[2]
    assert figures[1] > figures[0] if metric.better == "higher" else figures[1] < figures[0]
