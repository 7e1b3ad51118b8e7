"""What the CPU kernel takes for layers that are not in integers throughout, against torch: one process, calls in turn.

    python benchmarks/cpu_formats.py [--shape 1152x1152] [--tokens 1 --tokens 16 --tokens 256] [--threads 1]

Whole calls of random layers in bfloat16, bias included. Columns: milliseconds, and how many times faster than

    reference     the plain torch reference of the same layer
    decoded       torch.nn.functional.linear in float32 on activations rounded by torch and the main weight decoded in
                  each call, the branch left out: the least that decoding without a kernel takes
    float32 bf16  torch.nn.functional.linear on a weight that lies decoded in memory, activations not rounded
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from cpu import best
from torch import Tensor

from loraq import ops
from loraq.layer import Coded
from loraq.layout import Layout
from loraq.linear import PackedLinear

BRANCH = {"format": "bfloat16", "group": 64}
LAYERS: dict[str, dict[str, Any]] = {
    "W4A4, no branch": {"activation": "int4"},
    "W4A4, 16-bit branch, rotated": {"activation": "int4", "rank": 32, "transforms": [{"strategy": "hadamard"}]},
    "W4A4, 16-bit branch": {"activation": "int4", "rank": 32},
    "W4A16": {"activation": "none"},
    "W4A16, 16-bit branch": {"activation": "none", "rank": 32},
    "W8A16": {"activation": "none", "weight": "int8"},
    "W4A16, offsets": {"activation": "none", "weight": "int4_offset"},
    "MXFP4, A16": {"activation": "none", "weight": "mxfp4", "group": 32},
    "MXFP4, AMXFP8": {"activation": "mxfp8", "weight": "mxfp4", "group": 32},
    "NVFP4, A16": {"activation": "none", "weight": "nvfp4", "group": 16},
    "FP8, A16": {"activation": "none", "weight": "fp8_e4m3"},
}


def layer_of(out: int, inn: int, options: dict[str, Any]) -> PackedLinear:
    """A layer of random weights, in the formats of one of LAYERS."""
    rank = options.get("rank", 0)
    plain: dict[str, Any] = {
        "out": out,
        "inn": inn,
        "rank": rank,
        "main": {"format": options.get("weight", "int4"), "group": options.get("group", 64)},
        "activation": options["activation"],
        "packing": {"strategy": "rows"},
        "transforms": options.get("transforms", []),
    }
    if rank:
        plain |= {"down": BRANCH, "up": BRANCH, "branch_activation": "none"}
    layout = Layout.from_plain(plain)
    parts: dict[str, Tensor] = {}
    for name, storage, rows, columns in layout.matrices():
        coded = storage.format.encode(torch.randn(rows, columns) / columns**0.5, storage.group)
        parts |= {f"{name}.{key}": part for key, part in coded.parts.items()}
    return PackedLinear(layout, layout.pack(parts), torch.randn(out))


def measure(out: int, inn: int, tokens: int, name: str, seconds: float) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    layer = layer_of(out, inn, LAYERS[name])
    tensors, layout, bias = layer.stored(), layer.layout, layer.bias
    single = torch.randn(tokens, inn)
    half, weight = single.bfloat16(), torch.randn(out, inn)
    plain = weight.bfloat16()

    def decoded() -> Tensor:
        rows = ops.quantize_activation(half.float(), layout.activation)
        values = rows.decode() if isinstance(rows, Coded) else rows
        return torch.nn.functional.linear(values, layout.coded("main", tensors).decode(), bias)

    linear = torch.nn.functional.linear
    found = best(
        {
            "loraq": lambda: layer(half),
            "reference": lambda: ops.reference(half, tensors, bias, layout),
            "decoded": decoded,
            "float32": lambda: linear(single, weight),
            "bf16": lambda: linear(half, plain),
        },
        seconds,
    )
    ratios = " ".join(f"{found[each] / found['loraq']:9.2f}" for each in ("reference", "decoded", "float32", "bf16"))
    return f"{f'{inn}x{out}':>11} {tokens:6}  {name:30} {found['loraq'] * 1e3:9.3f} {ratios}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="INNxOUT (repeatable)")
    parser.add_argument("--tokens", action="append", type=int, help="repeatable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.1, help="how long each contender of a line runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'inn x out':>11} {'tokens':>6}  {'':30} {'ms':>9} reference   decoded   float32      bf16")
    for shape in options.shape or ("1152x1152", "1152x4608"):
        inn, out = (int(each) for each in shape.split("x"))
        for tokens in options.tokens or (1, 16, 256):
            for name in LAYERS:
                print(measure(out, inn, tokens, name, options.seconds), flush=True)


if __name__ == "__main__":
    main()
