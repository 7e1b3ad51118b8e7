"""Tell how often a saved pipeline draws what the caption asks for.

    python recipes/tiny_pixart/evaluate.py recipes/tiny-pixart-sigma --pictures 288

Pictures of scenes that were trained on and of scenes that were held out are generated through the pipeline
as any user would run it, and read back by `shapes.measure`, which contains nothing learned. Printed is the
share of pictures in which size, colour, shape, ground and all four are as the caption says.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loraq.shapes import ATTRIBUTES, ByteArray, Scene, caption, matches, measure, split_scenes
from models import Pipeline, load_pipeline, quieten

BATCH = 48
GUIDANCE = 3.0
SAMPLER_STEPS = 20


@dataclass(frozen=True)
class Scores:
    """Shares of right pictures, one per attribute and for all attributes at once."""

    pictures: int
    shares: tuple[float, ...]
    all_right: float

    def __str__(self) -> str:
        words = "  ".join(f"{name} {share:.1%}" for name, share in zip(ATTRIBUTES, self.shares, strict=True))
        return f"{words}  all four {self.all_right:.1%}  (n = {self.pictures})"


def generate(
    pipeline: Pipeline,
    captions: Sequence[str],
    guidance: float,
    steps: int,
    seed: int,
    padding: int = 16,
) -> ByteArray:
    """Generate one picture per caption; picture number i has the noise of seed + i whatever the batch.

    Short padding only saves time: padding is masked out.
    """
    pictures = []
    for start in range(0, len(captions), BATCH):
        chosen = list(captions[start : start + BATCH])
        generators = [torch.Generator("cpu").manual_seed(seed + start + index) for index in range(len(chosen))]
        pictures.append(
            pipeline(
                chosen,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
                use_resolution_binning=False,
                clean_caption=False,
                max_sequence_length=padding,
            ).images
        )
    everything: ByteArray = np.rint(np.concatenate(pictures) * 255).astype(np.uint8)
    return everything


def score(pictures: ByteArray, scenes: Sequence[Scene]) -> Scores:
    """Measure every picture and compare it with its scene."""
    right = np.array([matches(scene, measure(picture).scene) for scene, picture in zip(scenes, pictures, strict=True)])
    shares = tuple(float(share) for share in right.mean(axis=0))
    return Scores(len(pictures), shares, float(right.all(axis=1).mean()))


def choose_scenes(scenes: Sequence[Scene], count: int, seed: int) -> list[Scene]:
    """Return count scenes in random order, each as often as any other (give or take one)."""
    generator = np.random.default_rng(seed)
    rounds = -(-count // len(scenes))
    order = np.concatenate([generator.permutation(len(scenes)) for _ in range(rounds)])[:count]
    return [scenes[index] for index in order]


def contact_sheet(pictures: ByteArray, columns: int) -> Image.Image:
    """Lay pictures out in rows, as many as fill whole rows."""
    rows = len(pictures) // columns
    grid = pictures[: rows * columns].reshape(rows, columns, *pictures.shape[1:])
    return Image.fromarray(np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4).reshape(rows * 64, columns * 64, 3)))


def evaluate(
    folder: Path,
    count: int,
    guidance: float,
    steps: int,
    seed: int,
    padding: int = 16,
    sheets: Path | None = None,
) -> dict[str, Scores]:
    """Score `count` pictures of seen and as many of held-out scenes; save contact sheets if asked to."""
    pipeline = load_pipeline(folder)
    seen, held_out = split_scenes()
    results = {}
    for name, scenes in (("seen", seen), ("held-out", held_out)):
        chosen = choose_scenes(scenes, count, seed)
        pictures = generate(pipeline, [caption(scene) for scene in chosen], guidance, steps, seed, padding)
        results[name] = score(pictures, chosen)
        if sheets is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures[:96], min(12, len(pictures))).save(sheets / f"{name}.png")
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="saved pipeline")
    parser.add_argument("--pictures", type=int, default=288, help="pictures per group (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=SAMPLER_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--padding", type=int, default=16, help="tokens per caption; 300 is the pipeline's default")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    options = parser.parse_args()
    quieten()
    results = evaluate(
        options.folder,
        options.pictures,
        options.guidance,
        options.steps,
        options.seed,
        options.padding,
        options.sheets,
    )
    for name, scores in results.items():
        print(f"{name:9} {scores}")


if __name__ == "__main__":
    main()
