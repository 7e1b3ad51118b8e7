"""First stage: train the VAE, then encode the pictures that the transformer learns from.

The loss is the absolute plus squared error, the absolute error of the differences between neighbouring
pixels (it keeps edges crisp) and a small Kullback-Leibler term (it keeps the latents smooth and the decoder
tolerant of the small errors that a sampler makes). Afterwards the VAE's scaling factor is set so that latents
have unit variance, and latents of a fixed set of pictures are stored: encoding once is cheaper than at every
step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from upkeep import (
    AveragedWeights,
    Progress,
    ThreadChooser,
    learning_rate_share,
    load_if_present,
    save_atomically,
)

from loraq.shapes import ByteArray, draw, split_scenes
from models import Vae, build_vae

BATCH = 32
LEARNING_RATE = 1.5e-3
WARM_UP = 100
DECAY_SHARE = 0.4
DIVERGENCE_WEIGHT = 1e-3
SHAPE_WEIGHT = 4.0
AVERAGE_DECAY = 0.998
ENCODE_BATCH = 128


def to_tensor(pictures: ByteArray) -> torch.Tensor:
    """Turn [count, side, side, 3] bytes into [count, 3, side, side] between -1 and 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1.0)


def reconstruction_losses(pictures: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted error of the pixels and the absolute error of differences between neighbours.

    The shape's pixels weigh more than the ground's: without that the decoder first learns the ground alone
    and takes long to tell the colours of small shapes apart. No shape reaches the corner of its picture.
    """
    is_shape = (pictures - pictures[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1
    weights = 1.0 + SHAPE_WEIGHT * is_shape
    error = decoded - pictures
    pixel = (weights * (error.abs() + error * error)).mean()
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return pixel, across + down


def train_vae(work: Path, steps: int, seed: int, threads: int, save_every: int) -> Vae:
    """Train the VAE, or go on from the checkpoint in the work folder; return it with averaged weights."""
    path = work / "vae.pt"
    torch.manual_seed(seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    averages = AveragedWeights([vae], AVERAGE_DECAY)
    first_step = 0
    saved = load_if_present(path)
    if saved is not None:
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        averages.restore(saved["averages"])
        first_step = int(saved["step"])
    seen, _ = split_scenes()
    progress = Progress("vae", steps, 100)
    chooser = ThreadChooser(threads)
    for step in range(first_step, steps):
        chooser.before_step(step)
        # Seeding by step makes a resumed run see the same pictures as an uninterrupted one.
        generator = np.random.default_rng([seed, 1, step])
        torch.manual_seed(seed * 1_000_003 + step)
        pictures = to_tensor(draw([seen[index] for index in generator.integers(len(seen), size=BATCH)], generator))
        rate = LEARNING_RATE * learning_rate_share(step, steps, WARM_UP, DECAY_SHARE)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        pixel_loss, edge_loss = reconstruction_losses(pictures, decoded.float())
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = pixel_loss + 0.5 * edge_loss + DIVERGENCE_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        averages.update(step)
        progress.add(
            step,
            pixel=pixel_loss.item(),
            edge=edge_loss.item(),
            divergence=divergence.item(),
            spread=posterior.std.float().mean().item(),
            signal=posterior.mean.float().std().item(),
        )
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomically(
                {
                    "vae": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averages": averages.averages,
                    "step": step + 1,
                },
                path,
            )
    averages.swap()
    return vae.eval()


@torch.no_grad()
def encode_pictures(vae: Vae, work: Path, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (latents of unit variance, index of each one's scene among the seen scenes); set the scale."""
    path = work / "latents.pt"
    saved = load_if_present(path)
    if saved is None:
        seen, _ = split_scenes()
        scene_indices = torch.arange(count) % len(seen)
        latents = []
        for start in range(0, count, ENCODE_BATCH):
            chosen = scene_indices[start : start + ENCODE_BATCH].tolist()
            pictures = draw([seen[index] for index in chosen], np.random.default_rng([seed, 2, start]))
            latents.append(vae.encode(to_tensor(pictures)).latent_dist.mean)
            if start // ENCODE_BATCH % 50 == 0:
                print(f"latents {start}/{count}", flush=True)
        everything = torch.cat(latents)
        saved = {"latents": everything, "scenes": scene_indices, "scale": 1.0 / everything.std().item()}
        save_atomically(saved, path)
    vae.register_to_config(scaling_factor=float(saved["scale"]))
    return saved["latents"] * saved["scale"], saved["scenes"]


@torch.no_grad()
def reconstruct(vae: Vae, pictures: ByteArray) -> ByteArray:
    """Encode and decode pictures, to look at or measure what the VAE loses."""
    decoded = vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mean).sample
    return functional.relu(decoded.add(1.0).mul(127.5)).clamp(max=255).round().byte().permute(0, 2, 3, 1).numpy()
