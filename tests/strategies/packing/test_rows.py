"""The canonical layout: exact bytes by hand, and round trips for every width."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from loraq.strategies.packing.rows import Rows

from loraq.layer import Part

ROWS = Rows()


def test_int4_puts_the_even_column_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, -2, 7, -8, 3]], dtype=torch.int8)
    assert ROWS.pack(codes, Part.codes(1, 5, 4)).tolist() == [[0xE1, 0x87, 0x03]]


def test_int6_fills_a_little_endian_24_bit_word() -> None:
    codes = torch.tensor([[1, -1, 31, -32]], dtype=torch.int8)
    word = 1 | (0x3F << 6) | (31 << 12) | (0x20 << 18)
    assert ROWS.pack(codes, Part.codes(1, 4, 6)).tolist() == [list(word.to_bytes(3, "little"))]


def test_rows_are_padded_with_zero_codes() -> None:
    codes = torch.full((2, 5), -1, dtype=torch.int8)
    packed = ROWS.pack(codes, Part.codes(2, 5, 6))
    assert packed.shape == (2, 6)
    assert packed[:, 3:].tolist() == [[0x3F, 0, 0]] * 2


def test_scales_keep_their_bits_as_integers() -> None:
    scales = torch.tensor([[1.5, -0.0, 3e38]], dtype=torch.bfloat16)
    part = Part((1, 3), "bfloat16", 16)
    stored = ROWS.pack(scales, part)
    assert stored.dtype == torch.int16
    assert torch.equal(ROWS.unpack(stored, part).view(torch.int16), scales.view(torch.int16))


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 1000))
def test_every_width_comes_back_and_matches_a_bit_string(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (rows, columns), generator=generator).to(torch.int8)
    part = Part.codes(rows, columns, bits)
    packed = ROWS.pack(codes, part)
    assert torch.equal(ROWS.unpack(packed, part), codes)
    for row, octets in zip(codes.tolist(), packed.view(torch.uint8).tolist(), strict=True):
        stream = "".join(format(code & (2**bits - 1), f"0{bits}b")[::-1] for code in row)  # low bits first
        stream += "0" * (8 * len(octets) - len(stream))
        assert [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)] == octets
