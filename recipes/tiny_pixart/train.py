"""Train the tiny PixArt-Sigma pipeline from nothing, on two CPU cores, and save it.

    python recipes/tiny_pixart/train.py --out recipes/tiny-pixart-sigma --steps 6000

Three stages follow each other: the VAE (`autoencoder`), the text encoder and the transformer together
(`diffusion`), and the evaluation of the saved pipeline (`evaluate`). Checkpoints lie in the work folder;
the same command started again goes on from them, and a larger `--steps` prolongs a finished run. At every
checkpoint of the second stage a whole usable pipeline is also saved to `current` in the work folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from autoencoder import encode_pictures, train_vae
from diffusion import train_transformer
from evaluate import GUIDANCE, SAMPLER_STEPS, evaluate

from models import TextEncoder, Transformer, Vae, assemble, quieten


def save_pipeline(vae: Vae, text_encoder: TextEncoder, transformer: Transformer, folder: Path) -> None:
    """Save copies of the parts in bfloat16, replacing the parts that already lie in the folder."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Copies, because assembling casts to bfloat16 in place and training needs the full precision.
    pipeline = assemble(copy.deepcopy(vae), copy.deepcopy(text_encoder), copy.deepcopy(transformer))
    pipeline.save_pretrained(unfinished)
    # transformers loads in the dtype that the configuration names, diffusers in float32 unless told otherwise.
    configuration = unfinished / "text_encoder" / "config.json"
    configuration.write_text(configuration.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    # Without a dtype, transformers loads what is in the file but diffusers float32: make both agree.
    config = unfinished / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    # What the pipeline does not write, such as the model card, stays.
    if folder.exists():
        for kept in folder.iterdir():
            if not (unfinished / kept.name).exists():
                shutil.move(kept, unfinished / kept.name)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(folder)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("out/tiny-pixart"), help="folder for checkpoints")
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--latents", type=int, default=40_000, help="pictures that the transformer learns from")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the transformer")
    parser.add_argument("--batch", type=int, default=64, help="pictures per step of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads at most")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--pictures", type=int, default=288, help="pictures per group in the final evaluation")
    parser.add_argument("--quick-pictures", type=int, default=48, help="the same at every checkpoint; 0 for none")
    return parser.parse_args()


def main() -> None:
    """Run all stages."""
    options = parse_options()
    quieten()
    torch.set_num_threads(options.threads)
    vae = train_vae(options.work, options.vae_steps, options.seed, options.threads, options.save_every)
    latents, scenes = encode_pictures(vae, options.work, options.latents, options.seed)

    def export(text_encoder: TextEncoder, transformer: Transformer, step: int) -> None:
        """Save the pipeline as it is now and print how well it obeys."""
        current = options.work / "current"
        save_pipeline(vae, text_encoder, transformer, current)
        if options.quick_pictures:
            sheets = options.work / "sheets" / f"{step:06d}"
            for name, scores in evaluate(
                current, options.quick_pictures, GUIDANCE, SAMPLER_STEPS, options.seed, sheets=sheets
            ).items():
                print(f"after {step} steps, {name:9} {scores}", flush=True)

    text_encoder, transformer = train_transformer(
        latents,
        scenes,
        options.work,
        options.steps,
        options.batch,
        options.seed,
        options.threads,
        options.save_every,
        export,
    )
    save_pipeline(vae, text_encoder, transformer, options.out)
    for name, scores in evaluate(options.out, options.pictures, GUIDANCE, SAMPLER_STEPS, options.seed).items():
        print(f"{name:9} {scores}", flush=True)


if __name__ == "__main__":
    main()
