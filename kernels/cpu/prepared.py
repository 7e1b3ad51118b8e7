"""A layer made ready for the kernel: its repacked matrices, and the structures that tell the compiled code of them.

A product runs in integers where both sides have at most 8 bits, else in float32: a 16-bit branch is decoded once, a
main weight panel by panel. `refusal` says which layouts can be made ready. Where a main product in float32 takes
rounded activations, torch rounds them before the kernel (`rounded_before`), and the branch runs in torch beside it, as
does a branch of which only one side has integers (`branch` is False).

The online transforms are fused into the rounding of rows where they are, in this order, at most one smoothing and one
Hadamard rotation, whose signs are smoothing by 1 and -1; others run in torch before the kernel (`fused` is False).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy

from loraq.contracts import AbstractPreTransform
from loraq.errors import RegistryError
from loraq.formats import IntegerFormat
from loraq.layout import strategy_to_plain

from . import compiled, threads
from .float_repack import LARGEST_CHUNK, CodePanels, decodes, dense_panels
from .machines import Machine
from .records import MEMORY_BEGINS, FloatMatrix, Layer, Matrix, Rounding
from .repack import Panels, Segments, Weight, weight_group
from .tile import OUTPUTS

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.activation import Activation
    from loraq.layer import Coded
    from loraq.layout import Layout

_BLOCK_BYTES = 192 * 1024
"""A block's codes should leave room for a panel of weights in a second-level cache."""
_ROWS_BYTES = 1024 * 1024
"""The same of a block's rows in float32, where they are kept: they are read once a panel, one after the other."""
_LARGEST_BLOCK = 128
_SMOOTHINGS = ("smooth", "smooth_calibrated", "smooth_closed_form")
"""Transforms whose online part is `scales`, which the input is divided by."""
_PRIVATE: dict[str, Any] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
_MAPPED = 64 * 1024
"""Larger arrays get memory of their own from the system."""
_LARGEST_INN = 60_000
"""Sums of 8-bit codes over longer segments would not fit 32 bits."""


def refusal(layout: Layout) -> str | None:
    """None where the kernel takes this layout, else why not. Only the main product counts: a branch may be torch's."""
    return None if decodes(layout.main.format) else _misfit(layout, "main")


def rounded_before(layout: Layout) -> bool:
    """Whether the main product's activations are rounded in torch, before the kernel."""
    return _misfit(layout, "main") is not None and layout.activation.format is not None


def _branch(layout: Layout) -> str | None:
    """How the kernel computes the branch: "integer", "float", or None where torch has to, or there is none."""
    if not layout.rank or rounded_before(layout):
        return None
    if layout.branch_activation.format is None:
        return "float"
    return "integer" if _misfit(layout, "down") is None and _misfit(layout, "up") is None else None


def _misfit(layout: Layout, matrix: str) -> str | None:
    """Why the kernel cannot compute the product with this matrix, None where it can."""
    for name, storage, _, columns in layout.matrices():
        if name != matrix:
            continue
        if weight_group(storage.format, columns, storage.group) is None:
            return f"the CPU kernel multiplies 8-bit integers, and the {name} matrix is {storage.format.name}"
        rounding = layout.activation if name == "main" else layout.branch_activation
        if not isinstance(rounding.format, IntegerFormat) or rounding.format.bits > 8:
            return f"the CPU kernel multiplies 8-bit integers, and the input of {name} is rounded to {rounding}"
        if columns > _LARGEST_INN:
            return f"the CPU kernel sums at most {_LARGEST_INN} columns in 32 bits, and {name} has {columns}"
    return None


@attrs.frozen(eq=False)
class Prepared:
    """A layer ready to run: `address` of its records.Layer, and what keeps the memory behind it alive.

    `products` counts the multiplications of codes a token, `bytes` what the repacked form holds beside the checkpoint's
    tensors, `token_block` the tokens that a worker's memory (`memory_bytes`) has room for.
    """

    layout: Layout
    address: int
    run: int
    worker: Callable[[int], None]
    fused: bool
    branch: bool
    rounded_before: bool
    products: int
    panels: int
    token_block: int
    memory_bytes: int
    bytes: int
    kept: tuple[Any, ...] = attrs.field(repr=False)

    @classmethod
    def of(cls, layout: Layout, tensors: Mapping[str, Tensor], machine: Machine) -> Prepared:
        """Repack a layer whose layout is not refused."""
        return _Maker(layout, tensors, machine).made()


class _Maker:
    """Builds one Prepared: structures point to one another by address, so all are kept in `self.kept`."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], machine: Machine) -> None:
        self.layout = layout
        self.tensors = tensors
        self.machine = machine
        self.kept: list[Any] = []
        self.bytes = 0
        self.memory = MEMORY_BEGINS
        self.token_block = 4

    def made(self) -> Prepared:
        layout, branch = self.layout, _branch(self.layout)
        integer_main = _misfit(layout, "main") is None
        cuts, panels = {}, {}
        for name, storage, rows, columns in layout.matrices():
            if integer_main if name == "main" else branch == "integer":
                weight = Weight.of(layout, name, storage, rows, columns, self.tensors)
                cuts[name] = Segments.of(columns, self._activation(name).group_for(columns), weight.group)
                panels[name] = Panels.of(weight, cuts[name])
        same = layout.activation == layout.branch_activation
        shared = integer_main and branch == "integer" and same and cuts["main"].alike(cuts["down"])
        keeps_rows = not integer_main or branch == "float"
        codes = sum(cut.count * cut.slot for name, cut in cuts.items() if not (shared and name == "down"))
        self.token_block = min(_LARGEST_BLOCK, max(16, _BLOCK_BYTES // max(codes, 1) // 8 * 8))
        if keeps_rows:
            self.token_block = min(_LARGEST_BLOCK, max(16, _ROWS_BYTES // (4 * layout.inn) // 8 * 8))
        record = Layer(inn=layout.inn, out=layout.out, block=1)
        if integer_main:
            record.main = self._matrix(panels["main"], cuts["main"])
            second = panels["down"] if shared else panels["main"]
            record.round_main = self._rounding("main", cuts["main"], panels["main"], second)
        else:
            record.float_main = self._decoded(layout.coded("main", self.tensors))
        if branch == "float":
            record.float_down = self._dense(layout.coded("down", self.tensors).decode())
            record.float_up = self._dense(layout.coded("up", self.tensors).decode())
        if branch == "integer":
            record.down, record.up = self._matrix(panels["down"], cuts["down"]), self._matrix(panels["up"], cuts["up"])
            record.round_down = record.round_main
            if not shared:
                record.round_down = self._rounding("down", cuts["down"], panels["down"], panels["down"])
            record.round_thin = self._rounding("up", cuts["up"], panels["up"], panels["up"])
        # A branch in torch needs the transformed input there.
        in_torch = rounded_before(layout) or (layout.rank and branch is None)
        fused = not in_torch and self._transforms(record)
        record.row_stride = 4 * layout.inn if keeps_rows else 0
        record.row_at = self._place(4 * (layout.inn * (self.token_block if keeps_rows else 1) + 16))
        longest = max((cut.slot for cut in cuts.values()), default=0)
        record.part_at = self._place(4 * longest + 4 * max(layout.inn, layout.rank) + 64)
        record.limits_at = self._place(4 * max(layout.inn, layout.rank))
        record.thin_at = self._place(4 * self.token_block * (layout.rank + OUTPUTS))
        record.tile_at = self._place(4 * self.token_block * OUTPUTS)
        record.bias_at = self._place(4 * 2 * OUTPUTS)
        self.kept.append(record)
        return Prepared(
            layout=layout,
            address=ctypes.addressof(record),
            run=compiled.run(),
            worker=threads.worker(compiled.run()),
            fused=fused,
            rounded_before=rounded_before(layout),
            branch=branch is not None,
            products=layout.inn * layout.out + layout.rank * (layout.inn + layout.out),
            panels=-(-layout.out // OUTPUTS),
            token_block=self.token_block,
            memory_bytes=self.memory,
            bytes=self.bytes,
            kept=tuple(self.kept),
        )

    def _activation(self, name: str) -> Activation:
        return self.layout.activation if name == "main" else self.layout.branch_activation

    def _place(self, size: int) -> int:
        """Room for `size` bytes in a worker's memory."""
        place = self.memory
        self.memory += -(-size // 64) * 64
        return place

    def _hold(self, array: numpy.ndarray[Any, Any]) -> int:
        """Keep `array` as aligned as vectors want it; its address."""
        size = array.nbytes + 64
        # Long-lived blocks between short-lived ones would leave holes in the heap, 15 % of a model.
        if size > _MAPPED:
            room = numpy.frombuffer(mmap.mmap(-1, size, **_PRIVATE), numpy.uint8)
        else:
            room = numpy.empty(size, numpy.uint8)
        start = -room.ctypes.data % 64
        held = room[start : start + array.nbytes]
        held[:] = array.reshape(-1).view(numpy.uint8)
        self.kept.append(held)
        self.bytes += array.nbytes
        return int(held.ctypes.data)

    def _matrix(self, panels: Panels, cut: Segments) -> int:
        record = Matrix(
            product=compiled.product(self.machine, panels.bits),
            weights=self._hold(panels.codes),
            scales=self._hold(panels.scales),
            panels=len(panels.codes),
            panel_bytes=panels.codes.shape[1],
            segments=cut.count,
            slot=cut.slot,
        )
        self.kept.append(record)
        return ctypes.addressof(record)

    def _dense(self, weight: Tensor) -> int:
        """A matrix (rows, columns) that is held in float32."""
        return self._float_matrix(weights=self._hold(dense_panels(weight).numpy()), shape=(*weight.shape,))

    def _decoded(self, coded: Coded) -> int:
        """A matrix that is held in codes and decoded panel by panel."""
        panels = CodePanels.of(coded)
        chunk = max(LARGEST_CHUNK // panels.group * panels.group, panels.group)
        return self._float_matrix(
            shape=coded.shape,
            decoder=compiled.decoder(self.machine, panels.decoding),
            codes=self._hold(panels.codes.numpy()),
            panel_bytes=panels.codes[0].numel(),
            values=self._hold(panels.values.numpy()),
            scales=self._hold(panels.scales.numpy()),
            offsets=0 if panels.offsets is None else self._hold(panels.offsets.numpy()),
            group=panels.group,
            groups=panels.scales.shape[1],
            chunk=chunk,
            panel_at=self._place(4 * OUTPUTS * (chunk + 1)),  # an odd last column is decoded with a neighbour
        )

    def _float_matrix(self, shape: tuple[int, ...], **fields: int) -> int:
        product = compiled.float_product(self.machine)
        record = FloatMatrix(
            run=compiled.float_run(), product=product, panels=-(-shape[0] // OUTPUTS), columns=shape[1], **fields
        )
        self.kept.append(record)
        return ctypes.addressof(record)

    def _rounding(self, name: str, cut: Segments, weight: Panels, second: Panels) -> int:
        activation = self._activation(name)
        assert isinstance(activation.format, IntegerFormat), "refusal has looked"
        columns = int(cut.starts[-1])
        per_token = 4 * cut.count * self.token_block
        record = Rounding(
            columns=columns,
            group=activation.group_for(columns),
            segments=cut.count,
            slot=cut.slot,
            starts=self._hold(cut.starts),
            groups_of=self._hold(cut.of_input),
            offset=1 << (weight.bits - 1),
            second_offset=1 << (second.bits - 1),
            codes_at=self._place(cut.count * cut.slot * self.token_block),
            scales_at=self._place(per_token),
            offsets_at=self._place(per_token),
            second_at=self._place(per_token),
            top=activation.format.limit,
        )
        self.kept.append(record)
        return ctypes.addressof(record)

    def _transforms(self, record: Layer) -> bool:
        """Write the online transforms into `record`; False where torch has to run them."""
        chain = [_plain(each) for each in self.layout.transforms]
        names = [plain.get("strategy") for plain in chain]
        smoothed = names[:1] if names and names[0] in _SMOOTHINGS else []
        if names not in (smoothed, [*smoothed, "hadamard"]):
            return False
        divisors = self._online(0, "scales").float() if smoothed else None
        if names[-1:] == ["hadamard"]:
            record.block = math.gcd(self.layout.inn, int(chain[-1]["largest_block"]))
            record.factor = 1 / math.sqrt(record.block)
            if chain[-1]["signs"]:  # dividing by a negative divisor is exactly dividing, then changing the sign
                signs = 1 - 2 * self._online(len(chain) - 1, "signs").float()
                divisors = signs if divisors is None else divisors * signs
        if divisors is not None:
            record.smoothing = self._hold(divisors.numpy())
        return True

    def _online(self, index: int, name: str) -> Tensor:
        """A transform's stored online part."""
        part = self.layout.transforms[index].parts(self.layout.inn)[name]
        return self.layout.packing.unpack(self.tensors[f"transform.{index}.{name}"], part)


def _plain(transform: AbstractPreTransform) -> dict[str, Any]:
    """The transform's registered name and options; none for one that no entry point names."""
    try:
        return strategy_to_plain("pre_transform", transform)
    except RegistryError:
        return {}
