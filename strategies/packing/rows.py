"""The canonical layout: row-major, bit-packed, little-endian, readable without LoRaQ.

Codes narrower than a byte are packed densely along each row: element k of a row lies at bits [k·b, (k+1)·b) of the
row's little-endian bit stream, in two's complement. So int4 puts the even column in the low nibble, and int6 puts codes
4k..4k+3 at bits 0, 6, 12 and 18 of a 24-bit word. Each row is padded with zero codes to a whole period, the smallest
number of bytes that whole codes fill: one byte for int4, three for int6. Two- and four-byte values are stored as
integers of the same width, bit for bit, because loaders cast floating point tensors and leave integers alone.

    part            in memory              in the file
    int4 codes      int8 (rows, columns)   uint8 (rows, ceil(columns / 2))
    int6 codes      int8 (rows, columns)   uint8 (rows, 3 * ceil(columns / 4))
    int8 codes      int8 (rows, columns)   int8  (rows, columns)
    ternary codes   int8 (rows, columns)   uint8 (rows, ceil(columns / 5)), code + 1 as digits of base 3, first lowest
    scales          bfloat16 (rows, g)     int16 (rows, g)

No kernel reads this layout fast; a backend repacks at load for itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from loraq.blocks import by_rows
from loraq.contracts import AbstractPacking
from loraq.layer import Part
from loraq.layout import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from loraq.lazy import torch

_WIDTHS = {"float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "int16": 16}
_TRITS = (5, 1)
"""Five ternary codes a byte: 3^5 = 243."""
_SAME_WIDTH = {32: "int32", 16: "int16", 8: "uint8"}


@attrs.frozen(kw_only=True)
class Rows(AbstractPacking):
    """Row-major and bit-packed: the layout that checkpoints are exchanged in."""

    def stored(self, part: Part) -> Stored:
        if _narrow(part):
            codes, size = _TRITS if part.levels == 3 else _period(part.bits)
            return Stored((*part.shape[:-1], size * math.ceil(part.shape[-1] / codes)), "uint8")
        return Stored(part.shape, _stored_dtype(part))

    def pack(self, tensor: Tensor, part: Part) -> Tensor:
        if part.levels == 3:
            return _pack_trits(tensor)
        if _narrow(part):
            if tensor.dim() != 2:
                return _pack_bits(tensor, part.bits)
            return by_rows(lambda rows: _pack_bits(rows, part.bits), tensor)
        return tensor.contiguous().view(getattr(torch, _stored_dtype(part)))

    def unpack(self, stored: Tensor, part: Part) -> Tensor:
        if part.levels == 3:
            return _unpack_trits(stored, part)
        if _narrow(part):
            return _unpack_bits(stored, part)
        return stored.view(getattr(torch, part.dtype))


def _narrow(part: Part) -> bool:
    """Whether a part's codes are narrower than the bytes that hold them in memory."""
    return part.bits < _WIDTHS.get(part.dtype, 8)


def _stored_dtype(part: Part) -> str:
    if part.dtype in ("int8", "uint8"):
        return part.dtype
    return _SAME_WIDTH[_WIDTHS.get(part.dtype, 8)]


def _period(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes."""
    return 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(..., columns) codes to (..., bytes) uint8."""
    per_word, size = _period(bits)
    padding = -codes.shape[-1] % per_word
    codes = torch.nn.functional.pad(codes, (0, padding))
    # One little-endian word a period: at most seven codes of seven bits, 49 bits.
    words = codes.to(torch.int64).bitwise_and_((1 << bits) - 1).reshape(*codes.shape[:-1], -1, per_word)
    shifts = torch.arange(per_word, device=codes.device) * bits
    word = (words << shifts).sum(dim=-1, keepdim=True)
    octets = (word >> (8 * torch.arange(size, device=codes.device))).bitwise_and_(0xFF)
    return octets.to(torch.uint8).reshape(*codes.shape[:-1], -1)


def _unpack_bits(stored: Tensor, part: Part) -> Tensor:
    """(..., bytes) uint8 to the codes of `part`."""
    bits, columns = part.bits, part.shape[-1]
    if bits == 4:  # the common case, in bytes: a tenth of the time of the general one
        return _unpack_nibbles(stored, part)
    per_word, size = _period(bits)
    octets = stored.to(torch.int64).reshape(*stored.shape[:-1], -1, size)
    word = (octets << (8 * torch.arange(size, device=stored.device))).sum(dim=-1, keepdim=True)
    codes = (word >> (bits * torch.arange(per_word, device=stored.device))).bitwise_and_((1 << bits) - 1)
    codes = codes.reshape(*stored.shape[:-1], -1)[..., :columns]
    if part.dtype == "int8":  # two's complement: the top bit counts negative
        codes = codes - ((codes >> (bits - 1)) << bits)
    return codes.to(getattr(torch, part.dtype)).contiguous()


def _unpack_nibbles(stored: Tensor, part: Part) -> Tensor:
    """(..., bytes) uint8 to the 4-bit codes of `part`."""
    if part.dtype == "int8":  # shifting right repeats the sign
        octets = stored.view(torch.int8)
        low, high = (octets << 4) >> 4, octets >> 4
    else:
        low, high = stored & 0xF, stored >> 4
    codes = torch.stack((low, high), dim=-1).flatten(-2)
    return codes[..., : part.shape[-1]].contiguous()


def _pack_trits(codes: Tensor) -> Tensor:
    """(..., columns) codes -1, 0, 1 to (..., bytes) uint8; the padding is zero codes."""
    per_word, _ = _TRITS
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    digits = (codes.to(torch.int32) + 1).reshape(*codes.shape[:-1], -1, per_word)
    return (digits * 3 ** torch.arange(per_word, device=codes.device, dtype=torch.int32)).sum(dim=-1).to(torch.uint8)


def _unpack_trits(stored: Tensor, part: Part) -> Tensor:
    """(..., bytes) uint8 to the codes of `part`."""
    powers = 3 ** torch.arange(_TRITS[0], device=stored.device, dtype=torch.int32)
    digits = (stored.to(torch.int32).unsqueeze(-1) // powers) % 3 - 1
    return digits.reshape(*stored.shape[:-1], -1)[..., : part.shape[-1]].to(torch.int8).contiguous()
