"""The compiled layer: what one worker does with a call. All operations of a packed layer are one parallel region.

A call is cut into tasks, `token_blocks` x `output_parts`. A task takes a block of tokens through the whole layer while
its codes stay in the cache: rows are transformed and rounded, multiplied with `down`, the thin rows are rounded, and
then each panel of 32 outputs is made, main product first, branch and bias on top. Products that do not run in integers
take the transformed rows themselves. No task waits for another, so there are no barriers; where the outputs are cut
because the tokens are few, each part rounds its rows anew, which is cheaper than to wait.

A worker is `run(address of a records.Call)`, in any number of threads at once: each draws a number for its piece of
the scratch memory, then tasks until none are left.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy
from numba import carray  # type: ignore[attr-defined]  # it is there, but not in __all__

from .memory import butterflies_16, butterflies_128, call, encode, largest_bits, pointer, take_ticket
from .records import CALL, FLOAT_ARGUMENTS_AT, FLOAT_MATRIX, LAYER, MATRIX, ROUNDING
from .tile import OUTPUTS

_compiled = numba.njit(nogil=True, error_model="numpy")

_ZERO, _INFINITY, _NAN = numpy.float32(0), numpy.float32(numpy.inf), numpy.float32(numpy.nan)
_INFINITE_BITS = 0x7F800000


@_compiled
def _float32_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.float32)


@_compiled
def _uint32_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.uint32)


@_compiled
def _uint16_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.uint16)


@_compiled
def _int32_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.int32)


@_compiled
def _int64_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.int64)


@_compiled
def _bytes_at(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), numpy.int8)


@_compiled
def _scale(limit_bits: Any, top: Any) -> Any:
    """A group's scale from the bits of its largest magnitude: limit / top, rounded to bfloat16, ties to even."""
    if limit_bits > _INFINITE_BITS:
        return _NAN
    scaled = numpy.uint32(limit_bits).view(numpy.float32) / top
    bits = numpy.float32(scaled).view(numpy.uint32)
    odd = (bits >> numpy.uint32(16)) & numpy.uint32(1)
    bits = (bits + numpy.uint32(0x7FFF) + odd) & numpy.uint32(0xFFFF0000)
    return numpy.uint32(bits).view(numpy.float32)


@_compiled
def _padded(source: Any, part: Any, count: Any) -> Any:
    """`count` float32 at `source` copied to `part` with zeros up to a multiple of 16; that multiple."""
    whole = (count + 15) // 16 * 16
    values, copy = _float32_at(source, count), _float32_at(part, whole)
    for index in range(count):
        copy[index] = values[index]
    for index in range(count, whole):
        copy[index] = _ZERO
    return whole


@_compiled
def _round_row(rounding: Any, row: Any, limits_at: Any, part: Any, memory: Any, token: Any) -> None:
    """Round the float32 row at `row`: codes, scales and offsets of `token` in the worker's memory."""
    columns, group, segments, slot = rounding.columns, rounding.group, rounding.segments, rounding.slot
    top = numpy.float32(rounding.top)
    groups = (columns + group - 1) // group
    limits = _float32_at(limits_at, groups)
    for index in range(groups):
        first = index * group
        count = min(group, columns - first)
        source = row + 4 * first
        if count % 16:
            count = _padded(source, part, count)
            source = part
        limits[index] = _scale(largest_bits(source, count), top)
    starts, groups_of = _int64_at(rounding.starts, segments + 1), _int64_at(rounding.groups_of, segments)
    codes = memory + rounding.codes_at + token * segments * slot
    scales = _float32_at(memory + rounding.scales_at + token * segments * 4, segments)
    offsets = _int32_at(memory + rounding.offsets_at + token * segments * 4, segments)
    second = _int32_at(memory + rounding.second_at + token * segments * 4, segments)
    for segment in range(segments):
        count = starts[segment + 1] - starts[segment]
        source = row + 4 * starts[segment]
        if count % 16:
            count = _padded(source, part, count)
            source = part
        scale = limits[groups_of[segment]]
        target = codes + segment * slot
        total = encode(source, target, count, _INFINITY if scale == _ZERO else scale, top)
        if count < slot:
            rest = _bytes_at(target + count, slot - count)
            for index in range(slot - count):
                rest[index] = 0
        scales[segment] = scale
        offsets[segment] = -total * rounding.offset
        second[segment] = -total * rounding.second_offset


@_compiled
def _rotate(row: Any, inn: Any, block: Any, factor: Any) -> None:
    """The Hadamard rotation of each block of the row at `row`, in place; passes in order of their steps."""
    step = 1
    if block >= 128:
        butterflies_128(row, inn)
        step = 128
    elif block >= 16:
        butterflies_16(row, inn)
        step = 16
    values = _float32_at(row, inn)
    while step < block:
        for first in range(0, inn, 2 * step):
            upper, lower = values[first : first + step], values[first + step : first + 2 * step]
            for index in range(step):
                one, other = upper[index], lower[index]
                upper[index] = one + other
                lower[index] = one - other
        step *= 2
    for index in range(inn):
        values[index] = values[index] * factor


@_compiled
def _untouched(task: Any, layer: Any) -> Any:
    """Whether the rows are the input itself, as nothing is done to it."""
    return task.bfloat16_in == 0 and layer.smoothing == 0 and layer.block == 1


@_compiled
def _row(task: Any, layer: Any, first: Any, index: Any, memory: Any) -> Any:
    """The address of the transformed row of token `first + index` as float32."""
    inn, token = layer.inn, first + index
    if _untouched(task, layer):
        return task.input + token * inn * 4
    row = memory + layer.row_at + index * layer.row_stride
    values = _float32_at(row, inn)
    if task.bfloat16_in:
        half, bits = _uint16_at(task.input + token * inn * 2, inn), _uint32_at(row, inn)
        for index in range(inn):
            bits[index] = numpy.uint32(half[index]) << numpy.uint32(16)
    else:
        source = _float32_at(task.input + token * inn * 4, inn)
        for index in range(inn):
            values[index] = source[index]
    if layer.smoothing:
        divisors = _float32_at(layer.smoothing, inn)
        for index in range(inn):
            values[index] = values[index] / divisors[index]
    if layer.block > 1:
        _rotate(row, inn, layer.block, numpy.float32(layer.factor))
    return row


@_compiled
def _product(
    matrix: Any,
    rounding: Any,
    offsets: Any,
    memory: Any,
    panel: Any,
    bias: Any,
    target: Any,
    stride: Any,
    add: Any,
    tokens: Any,
) -> None:
    """One panel of a product, tokens x 32 float32 at `target`."""
    given = _int64_at(memory, 13)  # tile.ARGUMENTS, at the beginning of the worker's memory
    given[0] = memory + rounding.codes_at
    given[1] = memory + rounding.scales_at
    given[2] = memory + offsets
    given[3] = matrix.segments
    given[4] = matrix.slot
    given[5] = matrix.weights + panel * matrix.panel_bytes
    given[6] = matrix.scales + panel * matrix.segments * OUTPUTS * 2
    given[7] = bias
    given[8] = target
    given[9] = stride
    given[10] = add
    given[11] = tokens
    given[12] = matrix.panel_bytes
    call(matrix.product, memory)


@_compiled
def _float_product(
    matrix: Any,
    rows: Any,
    row_stride: Any,
    memory: Any,
    panel: Any,
    bias: Any,
    zeros: Any,
    target: Any,
    stride: Any,
    add: Any,
    tokens: Any,
) -> None:
    """One panel of a product in float32, by a function of its own: most layers never need it compiled."""
    given = _int64_at(memory + FLOAT_ARGUMENTS_AT, 11)  # float_panel.ARGUMENTS
    given[0] = matrix
    given[1] = rows
    given[2] = row_stride
    given[3] = memory
    given[4] = panel
    given[5] = bias
    given[6] = zeros
    given[7] = target
    given[8] = stride
    given[9] = add
    given[10] = tokens
    call(carray(pointer(matrix), (1,), FLOAT_MATRIX)[0].run, memory + FLOAT_ARGUMENTS_AT)


@_compiled
def _round_block(task: Any, layer: Any, memory: Any, first: Any, tokens: Any) -> None:
    """Everything up to the codes of the main product and of the branch's second product, for a block of tokens."""
    round_main = carray(pointer(layer.round_main), (1,), ROUNDING)[0]  # not looked at where there is none
    limits, part = memory + layer.limits_at, memory + layer.part_at
    for token in range(tokens):
        row = _row(task, layer, first, token, memory)
        if layer.round_main != 0:
            _round_row(round_main, row, limits, part, memory, token)
        if layer.round_down != layer.round_main and layer.round_down != 0:
            round_down = carray(pointer(layer.round_down), (1,), ROUNDING)[0]
            _round_row(round_down, row, limits, part, memory, token)
    if layer.float_down != 0:
        _float_down(task, layer, memory, first, tokens)
    if layer.down == 0:
        return
    down = carray(pointer(layer.down), (1,), MATRIX)[0]
    round_down = carray(pointer(layer.round_down), (1,), ROUNDING)[0]
    round_thin = carray(pointer(layer.round_thin), (1,), ROUNDING)[0]
    thin, stride = memory + layer.thin_at, down.panels * OUTPUTS * 4
    zeros = _zero_bias(memory + layer.bias_at)
    for panel in range(down.panels):
        target = thin + panel * OUTPUTS * 4
        _product(down, round_down, round_down.second_at, memory, panel, zeros, target, stride, 0, tokens)
    for token in range(tokens):
        _round_row(round_thin, thin + token * stride, limits, part, memory, token)


@_compiled
def _rows(task: Any, layer: Any, memory: Any, first: Any) -> Any:
    """(address, bytes from one to the next) of a block's transformed rows, where the layer keeps them."""
    if _untouched(task, layer):
        return task.input + first * layer.inn * 4, layer.inn * 4
    return memory + layer.row_at, layer.row_stride


@_compiled
def _float_down(task: Any, layer: Any, memory: Any, first: Any, tokens: Any) -> None:
    """The thin rows of a block of tokens, by the product in float32."""
    down = carray(pointer(layer.float_down), (1,), FLOAT_MATRIX)[0]
    rows, row_stride = _rows(task, layer, memory, first)
    zeros = _zero_bias(memory + layer.bias_at)
    for panel in range(down.panels):
        target = memory + layer.thin_at + panel * OUTPUTS * 4
        stride = down.panels * OUTPUTS * 4
        _float_product(layer.float_down, rows, row_stride, memory, panel, zeros, zeros, target, stride, 0, tokens)


@_compiled
def _zero_bias(address: Any) -> Any:
    values = _float32_at(address, OUTPUTS)
    for index in range(OUTPUTS):
        values[index] = _ZERO
    return address


@_compiled
def _panel_bias(task: Any, layer: Any, panel: Any, place: Any) -> Any:
    """The address of the bias of one panel's outputs, padded with zeros."""
    values = _float32_at(place, OUTPUTS)
    first = panel * OUTPUTS
    count = min(OUTPUTS, layer.out - first) if task.bias else 0
    bias = _float32_at(task.bias + first * 4, count)
    for index in range(count):
        values[index] = bias[index]
    for index in range(count, OUTPUTS):
        values[index] = _ZERO
    return place


@_compiled
def _write(task: Any, layer: Any, tile: Any, panel: Any, first: Any, tokens: Any) -> None:
    """Copy a finished tile to the output, as bfloat16 where that is wanted."""
    out, start = layer.out, panel * OUTPUTS
    count = min(OUTPUTS, out - start)
    for token in range(tokens):
        place = (first + token) * out + start
        if task.bfloat16_out:
            bits, half = _uint32_at(tile + token * OUTPUTS * 4, count), _uint16_at(task.output + 2 * place, count)
            for index in range(count):
                value = bits[index]
                rounded = (
                    value + numpy.uint32(0x7FFF) + ((value >> numpy.uint32(16)) & numpy.uint32(1))
                ) >> numpy.uint32(16)
                number = (value & numpy.uint32(0x7FFFFFFF)) <= numpy.uint32(_INFINITE_BITS)
                half[index] = numpy.uint16(rounded if number else numpy.uint32(0x7FC0))
        else:
            values, target = _float32_at(tile + token * OUTPUTS * 4, count), _float32_at(task.output + 4 * place, count)
            for index in range(count):
                target[index] = values[index]


@_compiled
def _outputs(
    task: Any, layer: Any, memory: Any, first: Any, panel: Any, bias: Any, target: Any, stride: Any, tokens: Any
) -> None:
    """One panel of the layer's outputs: the main product, the branch's and the bias."""
    zeros = _zero_bias(memory + layer.bias_at + OUTPUTS * 4)
    last = bias if layer.up == 0 and layer.float_up == 0 else zeros
    if layer.main != 0:
        main = carray(pointer(layer.main), (1,), MATRIX)[0]
        rounding = carray(pointer(layer.round_main), (1,), ROUNDING)[0]
        _product(main, rounding, rounding.offsets_at, memory, panel, last, target, stride, 0, tokens)
    else:
        rows, row_stride = _rows(task, layer, memory, first)
        _float_product(layer.float_main, rows, row_stride, memory, panel, last, zeros, target, stride, 0, tokens)
    if layer.up != 0:
        up = carray(pointer(layer.up), (1,), MATRIX)[0]
        thin = carray(pointer(layer.round_thin), (1,), ROUNDING)[0]
        _product(up, thin, thin.offsets_at, memory, panel, bias, target, stride, 1, tokens)
    if layer.float_up != 0:
        rank = carray(pointer(layer.float_up), (1,), FLOAT_MATRIX)[0].columns
        rows, row_stride = memory + layer.thin_at, (rank + OUTPUTS - 1) // OUTPUTS * OUTPUTS * 4
        _float_product(layer.float_up, rows, row_stride, memory, panel, bias, zeros, target, stride, 1, tokens)


@_compiled
def _task(task: Any, layer: Any, memory: Any, number: Any) -> None:
    """One block of tokens through one part of the outputs."""
    block, part = number // task.output_parts, number % task.output_parts
    first = block * task.token_block
    tokens = min(task.token_block, task.tokens - first)
    _round_block(task, layer, memory, first, tokens)
    panels = (layer.out + OUTPUTS - 1) // OUTPUTS
    for panel in range(part * panels // task.output_parts, (part + 1) * panels // task.output_parts):
        direct = task.bfloat16_out == 0 and (panel + 1) * OUTPUTS <= layer.out
        if direct:
            target, stride = task.output + (first * layer.out + panel * OUTPUTS) * 4, layer.out * 4
        else:
            target, stride = memory + layer.tile_at, OUTPUTS * 4
        bias = _panel_bias(task, layer, panel, memory + layer.bias_at)
        _outputs(task, layer, memory, first, panel, bias, target, stride, tokens)
        if not direct:
            _write(task, layer, target, panel, first, tokens)


def run(address: Any) -> None:
    """A worker: compiled by loraq.kernels.cpu.compiled, called with the address of a records.Call."""
    task = carray(pointer(address), (1,), CALL)[0]
    layer = carray(pointer(task.layer), (1,), LAYER)[0]
    memory = task.memory + take_ticket(address) * task.memory_stride
    tasks = task.token_blocks * task.output_parts
    number = take_ticket(address + 8)
    while number < tasks:
        _task(task, layer, memory, number)
        number = take_ticket(address + 8)
