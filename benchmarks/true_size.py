"""How long a model of true size takes, and how much memory: `loraq run` as a process of its own, on random weights.

    python benchmarks/true_size.py [--model pixart-sigma | sana] [--steps 200] [--workers 2] [--layers N]

The architecture is the real one (diffusers' class, the published sizes), the weights are seeded: a decaying spectrum,
noise, and a few input channels eight times the others. Times depend on the shapes alone; errors mean little here. The
recipe is the shipped one of that model but for its folder, so the figures are what a user of the real weights will see.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def model_of(name: str, layers: int | None) -> Any:
    """The transformer, bfloat16, with `layers` blocks or all."""
    import diffusers

    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "pixart-sigma": (
            diffusers.PixArtTransformer2DModel,
            {"num_layers": 28, "sample_size": 128, "in_channels": 4, "out_channels": 8, "caption_channels": 4096},
        ),
        "sana": (diffusers.SanaTransformer2DModel, {"num_layers": 20}),
    }
    maker, options = makers[name]
    if layers is not None:
        options["num_layers"] = layers
    torch.manual_seed(0)
    with torch.device("meta"):
        model = maker(**options)
    model = model.to_empty(device="cpu").bfloat16()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(weight_like(parameter.shape, generator))
    return model


def weight_like(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values; of a matrix with a spectrum that decays and a few large columns."""
    if len(shape) < 2 or min(shape[0], shape[1]) < 64:
        return torch.randn(shape, generator=generator) * 0.02
    out, inn = shape[0], shape[1:].numel()
    rank = min(out, inn, 256)
    strengths = torch.arange(1, rank + 1).pow(-0.6)
    values = torch.randn(out, rank, generator=generator) * strengths @ torch.randn(rank, inn, generator=generator)
    values = values / values.std() + 0.5 * torch.randn(out, inn, generator=generator)
    values[:, torch.randperm(inn, generator=generator)[:8]] *= 8
    return (values * 0.02).reshape(shape)


def main() -> None:
    """Build, quantize, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pixart-sigma", "sana"), default="pixart-sigma")
    parser.add_argument("--steps", type=int, help="loraq_fast's steps, instead of the recipe's")
    parser.add_argument("--workers", type=int, default=0, help="layers in flight, one thread each; 0 takes one a core")
    parser.add_argument("--layers", type=int, help="only so many blocks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        model = model_of(options.model, options.layers)
        weights = sum(each.numel() for each in model.parameters())
        model.save_pretrained(folder)
        del model
        recipe = (ROOT / "recipes" / f"{options.model}-w4a4.toml").read_text(encoding="utf-8")
        lines = [line for line in recipe.splitlines() if not line.startswith("model.hub")]
        path = Path(home) / "recipe.toml"
        path.write_text("\n".join([f'model.folder = "{folder}"', *lines]), encoding="utf-8")
        settings = [f"run.output={home}/out", f"run.workers={options.workers}"]
        settings += [] if options.steps is None else [f"low_rank.steps={options.steps}"]
        command = [sys.executable, "-m", "loraq", "run", str(path)]
        command += [part for setting in settings for part in ("--set", setting)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stderr)
        print(next(line for line in reversed(done.stdout.splitlines()) if "done in" in line).strip())
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{options.model}, {weights / 1e9:.2f} B weights: {seconds:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} "
            f"processor seconds, peak {usage.ru_maxrss / 2**20:.2f} GiB"
        )


if __name__ == "__main__":
    main()
