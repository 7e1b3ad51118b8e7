"""Packed layers with random codes and scales, in all formats of small integers: what no quantizer would make, too."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from loraq import formats
from loraq.layout import Layout
from matrices import seeded

ACTIVATIONS = st.sampled_from(["int4", "int6", "int8"])
WEIGHTS = st.sampled_from(["int2", "int4", "int6", "int8", "ternary", "int4_asymmetric", "int6_asymmetric", "int4x2"])
SIGNED = {"strategy": "hadamard", "signs": True}
FUSED = [
    (),
    ("hadamard",),
    (SIGNED,),
    ("smooth",),
    ("smooth", "hadamard"),
    ("smooth_calibrated", SIGNED),
    ("smooth_closed_form", "hadamard"),
]
"""Transforms that the kernel does itself."""
TRANSFORMS = [*FUSED, ("hadamard", "smooth_closed_form"), (SIGNED, "hadamard")]
GROUPS = st.sampled_from([1, 3, 16, 32, 64, 100, 1000])


def layout_of(
    out: int,
    inn: int,
    rank: int = 0,
    *,
    weight: str = "int4",
    branch: str = "int8",
    activation: Any = "int8",
    branch_activation: Any = "int8",
    group: int = 64,
    transforms: tuple[str | dict[str, Any], ...] = (),
) -> Layout:
    """A layout of integer formats, all weights in groups of `group`."""
    plain: dict[str, Any] = {
        "out": out,
        "inn": inn,
        "rank": rank,
        "main": {"format": weight, "group": group},
        "activation": activation,
        "packing": {"strategy": "rows"},
        "transforms": [{"strategy": each} if isinstance(each, str) else each for each in transforms],
    }
    if rank:
        both = {"format": branch, "group": group}
        plain |= {"down": both, "up": both, "branch_activation": branch_activation}
    return Layout.from_plain(plain)


def tensors_of(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Random stored tensors: codes over the format's whole range, scales of either size, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, storage, rows, columns in layout.matrices():
        if not isinstance(storage.format, formats.IntegerFormat):
            coded = storage.format.encode(torch.randn(rows, columns, generator=generator), storage.group)
            parts |= {f"{name}.{key}": part for key, part in coded.parts.items()}
            continue
        edge = 2 ** (storage.format.bits - 1)
        described = storage.format.parts(rows, columns, storage.group)
        codes = torch.randint(-edge, edge, (rows, columns), generator=generator, dtype=torch.int8)
        codes[0] = -edge  # the longest sums
        scales = torch.randn(described["scales"].shape, generator=generator).exp2().bfloat16()
        scales[rows // 2] *= torch.rand(scales.shape[1], generator=generator) > 0.5
        parts |= {f"{name}.codes": codes, f"{name}.scales": scales}
    for index, transform in enumerate(layout.transforms):
        for name, part in transform.parts(layout.inn).items():
            if part.bits == 1:
                online = torch.randint(2, part.shape, generator=generator)
            else:  # no powers of two, by which multiplying would be as good as dividing
                online = torch.exp2(18 * torch.rand(part.shape, generator=generator) - 9)
            parts[f"transform.{index}.{name}"] = online.to(getattr(torch, part.dtype))
    return layout.pack(parts)


def inputs_of(tokens: int, inn: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Activations with a token of zeros, one of equal numbers, and an outlier channel."""
    input = seeded(tokens, inn, seed=seed, scale=scale)
    input[:, seed % inn] *= 30
    input[tokens // 2] = scale
    input[tokens // 3] = 0
    return input


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of odd shapes."""
    out, inn = draw(st.integers(1, 80)), draw(st.one_of(st.integers(1, 210), st.sampled_from([64, 128, 192, 320])))
    rank = draw(st.one_of(st.just(0), st.integers(1, min(out, inn, 70))))
    group = st.one_of(st.sampled_from([1, 3, 16, 32, 64, 100]), st.just("token"))

    def activation() -> Any:
        return {"format": draw(ACTIVATIONS), "group": draw(group)}

    first = activation()
    return layout_of(
        out,
        inn,
        rank,
        weight=draw(WEIGHTS),
        branch=draw(WEIGHTS),
        activation=first,
        branch_activation=draw(st.one_of(st.just(first), st.builds(activation))),
        group=draw(GROUPS),
        transforms=draw(st.sampled_from(TRANSFORMS)),
    )


def same(first: Tensor, second: Tensor) -> bool:
    """Equal bit for bit, but that zeros have no sign and all that is not a number is alike."""
    return first.dtype == second.dtype and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
