"""The number formats of the peers that LoRaQ has not: unsigned codes with an offset or zero point that is a float.

    uint4_offset      value = code * scale + offset, both bfloat16        (sdnq with 16-bit scales, optimum-quanto)
    uint4_offset32    the same, both float32                              (sdnq as it is by default)
    uint4_zero        value = (code - zero) * scale, both bfloat16        (hqq)

Scales and offsets belong to a group of columns, a row's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from loraq.contracts import AbstractFormat
from loraq.formats import grouped, largest, no_integers, ungrouped, with_codes
from loraq.layer import Coded, Part, groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_BITS = {"bfloat16": 16, "float32": 32}


@attrs.frozen
class UnsignedFormat(AbstractFormat):
    """Codes 0 .. 2^bits - 1 over a group's range from its least to its largest value, which need not hold 0.

    `second` is what stands beside the scale: "offsets", or "zeros" in units of the scale. A group of equal values has
    no range: with offsets it is its value, with zero points a scale of 1 and a zero point of minus that value.
    """

    name: str
    bits: int
    second: Literal["offsets", "zeros"]
    dtype: str = "bfloat16"

    @property
    def integer(self) -> bool:
        return False

    @property
    def block(self) -> int | None:
        return None

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits) - 1

    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        part = Part((rows, groups_of(columns, group)), self.dtype, _BITS[self.dtype])
        return {"codes": Part.codes(rows, columns, self.bits, signed=False), "scales": part, self.second: part}

    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        del full_range  # every code is in use
        rows, columns = values.shape
        low, high = _range(values, group)
        if limits is not None:
            reached = largest(values, group)
            share = torch.where(reached > 0, limits / torch.where(reached > 0, reached, 1.0), 1.0)
            low, high = low * share, high * share
        kind = getattr(torch, self.dtype)
        scales = ((high - low) / self.top).to(kind)
        if self.second == "offsets":
            second = low.to(kind)
        else:
            scales = torch.where(scales == 0, torch.ones_like(scales), scales)
            second = (-low / scales.float()).to(kind)
        coded = self._coded((rows, columns), group, torch.zeros_like(values), scales, second)
        lowest, steps = self.points(coded)[..., :1], torch.where(scales == 0, torch.inf, scales.float()).unsqueeze(-1)
        codes = ((grouped(values, group) - lowest) / steps).round_().clamp_(0, self.top)
        return with_codes(coded, ungrouped(codes, columns))

    def _coded(self, shape: tuple[int, int], group: int, codes: Tensor, scales: Tensor, second: Tensor) -> Coded:
        parts = {"codes": codes.to(torch.uint8), "scales": scales, self.second: second}
        return Coded(self, shape, group, {name: part.contiguous() for name, part in parts.items()})

    def made(self, codes: Tensor, scales: Tensor, second: Tensor, group: int) -> Coded:
        """The coded matrix of these codes (rows, columns) and of scales and offsets or zero points (rows, groups).

        Raises ValueError where a number does not fit the format exactly.
        """
        kind = getattr(torch, self.dtype)
        for each in (scales, second):
            if not torch.equal(each.to(kind).to(each.dtype), each):
                raise ValueError(f"{self.name}: a scale or its companion is no {self.dtype}")
        if int(codes.min()) < 0 or int(codes.max()) > self.top:
            raise ValueError(f"{self.name}: a code lies outside of 0 to {self.top}")
        return self._coded((codes.shape[0], codes.shape[1]), group, codes, scales.to(kind), second.to(kind))

    def decode(self, coded: Coded) -> Tensor:
        return ungrouped(self._values(grouped(coded.codes.float(), coded.group), coded), coded.shape[1]).contiguous()

    def _values(self, codes: Tensor, coded: Coded) -> Tensor:
        """What `codes` (rows, groups, any) stand for under the scales of `coded`."""
        scales = coded.scales.float().unsqueeze(-1)
        second = coded.parts[self.second].float().unsqueeze(-1)
        return codes * scales + second if self.second == "offsets" else (codes - second) * scales

    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        raise no_integers(self)

    def points(self, coded: Coded) -> Tensor:
        return self._values(torch.arange(self.top + 1, dtype=torch.float32, device=coded.codes.device), coded)

    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        return with_codes(coded, indices)


def _range(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Each group's least and largest value, what fills the last group up left out: two of (rows, groups)."""
    present = grouped(torch.ones_like(values), group) > 0
    parted = grouped(values, group)
    return (
        torch.where(present, parted, torch.inf).amin(dim=-1),
        torch.where(present, parted, -torch.inf).amax(dim=-1),
    )


UINT4_OFFSET = UnsignedFormat("uint4_offset", 4, "offsets")
UINT4_OFFSET32 = UnsignedFormat("uint4_offset32", 4, "offsets", "float32")
UINT4_ZERO = UnsignedFormat("uint4_zero", 4, "zeros")
