"""How much memory a denoising step takes on the CPU: PixArt-Sigma of true size, bfloat16 and packed, from its folder.

    python benchmarks/cpu_memory.py [--layers 28]

Each model is saved (random weights; all linears of the blocks W4A8 with a rank-64 W8A8 branch and the Hadamard
rotation), then loaded with `from_pretrained` by a process of its own that draws one step (batch 1, 256 tokens) and says
how far its peak, the operating system's, lies above what it was after the imports and a step of a small model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cpu import RANK, random_layer

import loraq.diffusers as integration

STEP = """
import sys
import torch
import loraq, loraq.diffusers
from diffusers import PixArtTransformer2DModel
from loraq import ops
from loraq.kernels.cpu import backend, compiled

def peak():  # not getrusage, whose peak a process inherits from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(model, width):
    given = {
        "encoder_hidden_states": torch.randn(1, 120, width).bfloat16(),
        "timestep": torch.full((1,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.inference_mode():
        model(torch.randn(1, 4, 32, 32).bfloat16(), **given)

compiled.run()  # compiling is no part of it, nor is the code of the libraries, which a small model brings in
small = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64}
shape = {"sample_size": 32, "in_channels": 4, "out_channels": 8, "use_additional_conditions": False}
step(PixArtTransformer2DModel(**small, **shape, caption_channels=32).bfloat16(), 32)
before = peak()
step(PixArtTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16).eval(), 4096)
print(peak() - before)
"""


def main() -> None:
    """Save, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    from diffusers import PixArtTransformer2DModel

    maker: Any = PixArtTransformer2DModel
    torch.manual_seed(0)
    shape = {"num_layers": options.layers, "sample_size": 32, "in_channels": 4, "out_channels": 8}
    model = maker(**shape, caption_channels=4096, use_additional_conditions=False).bfloat16()
    with tempfile.TemporaryDirectory() as home:
        peaks = {}
        for name in ("bf16", "LoRaQ"):
            if name == "LoRaQ":
                pack(model)
            model.save_pretrained(Path(home) / name)
            os.sync()  # the system keeps pages that are not yet on the disk
            command = [sys.executable, "-c", STEP, str(Path(home) / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = int(done.stdout.split()[-1]) / 2**20
            bytes_on_disk = sum(path.stat().st_size for path in (Path(home) / name).iterdir()) / 2**30
            print(f"{name}: {peaks[name]:.2f} GiB above the imports, {bytes_on_disk:.2f} GiB on disk", flush=True)
        print(f"{peaks['LoRaQ'] / peaks['bf16']:.2f} of it")


def pack(model: Any) -> None:
    """Put random packed layers in the place of the blocks' linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            parent, _, leaf = name.rpartition(".")
            layer = random_layer(module.in_features, module.out_features, RANK, "hadamard")
            setattr(model.get_submodule(parent), leaf, layer)
    integration.mark_quantized(model)


if __name__ == "__main__":
    main()
