"""Second stage: train text encoder and transformer together by flow matching on the stored latents.

With share of noise s, the transformer sees (1 - s) * latent + s * noise at time step 1000 * s and learns
noise - latent. That is the convention of DPMSolverMultistepScheduler with flow sigmas, which the pipeline
samples with. One caption in ten is replaced by the empty one for classifier-free guidance. Captions are
padded to the longest one only; the pipeline pads to 300, which gives the same result because both text
encoder and cross-attention mask the padding out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from upkeep import (
    AveragedWeights,
    Progress,
    ThreadChooser,
    learning_rate_share,
    load_if_present,
    save_atomically,
)

from loraq.shapes import caption, split_scenes
from models import (
    TRAINING_TIMESTEPS,
    TextEncoder,
    Transformer,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)

LEARNING_RATE = 6e-4
WARM_UP = 300
DECAY_SHARE = 0.4
AVERAGE_DECAY = 0.999
CAPTION_DROPOUT = 0.1
LONG_PHRASING_SHARE = 0.25
UNIFORM_TIME_SHARE = 0.3

ExportFunction = Callable[[TextEncoder, Transformer, int], None]


def tokenize_captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask), [2 * scenes + 1, length]: both phrasings of every seen scene, then no caption."""
    seen, _ = split_scenes()
    captions = [caption(scene, phrasing) for phrasing in (0, 1) for scene in seen] + [""]
    tokens = build_tokenizer()(captions, padding="longest", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def choose_captions(scenes: torch.Tensor, scene_count: int) -> torch.Tensor:
    """Return for every scene a row of `tokenize_captions`: mostly phrasing 0, sometimes the empty caption."""
    rows = scenes + scene_count * (torch.rand(len(scenes)) < LONG_PHRASING_SHARE)
    dropped = torch.rand(len(scenes)) < CAPTION_DROPOUT
    return torch.where(dropped, 2 * scene_count, rows)


def sample_noise_shares(count: int) -> torch.Tensor:
    """Draw shares of noise: mostly around one half, where there is most to learn, some everywhere."""
    middling = torch.sigmoid(torch.randn(count))
    anywhere = torch.rand(count)
    return torch.where(torch.rand(count) < UNIFORM_TIME_SHARE, anywhere, middling)


def flow_loss(
    text_encoder: TextEncoder,
    transformer: Transformer,
    latents: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the mean squared error of the predicted velocity on a batch."""
    noise = torch.randn_like(latents)
    shares = sample_noise_shares(len(latents))
    mixed = torch.lerp(latents, noise, shares[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        states = text_encoder(input_ids=ids, attention_mask=mask)[0]
        velocity = transformer(
            mixed,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=shares * TRAINING_TIMESTEPS,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
    return functional.mse_loss(velocity.float(), noise - latents)


def build_optimizer(modules: list[nn.Module]) -> torch.optim.AdamW:
    """Build AdamW that decays matrices only: pulling biases and norms to zero helps nothing."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)


def train_transformer(
    latents: torch.Tensor,
    scenes: torch.Tensor,
    work: Path,
    steps: int,
    batch: int,
    seed: int,
    threads: int,
    save_every: int,
    export: ExportFunction,
) -> tuple[TextEncoder, Transformer]:
    """Train, or go on from the checkpoint in the work folder; return both models with averaged weights.

    `export` is called with averaged weights at every checkpoint, so a good model exists at any time.
    """
    path = work / "transformer.pt"
    torch.manual_seed(seed)
    ids, mask = tokenize_captions()
    scene_count = (len(ids) - 1) // 2
    text_encoder = build_text_encoder(len(build_tokenizer())).train()
    transformer = build_transformer().train()
    modules: list[nn.Module] = [text_encoder, transformer]
    optimizer = build_optimizer(modules)
    averages = AveragedWeights(modules, AVERAGE_DECAY)
    first_step = 0
    saved = load_if_present(path)
    if saved is not None:
        text_encoder.load_state_dict(saved["text_encoder"])
        transformer.load_state_dict(saved["transformer"])
        optimizer.load_state_dict(saved["optimizer"])
        averages.restore(saved["averages"])
        first_step = int(saved["step"])
    progress = Progress("transformer", steps, 100)
    chooser = ThreadChooser(threads)
    for step in range(first_step, steps):
        chooser.before_step(step)
        # Seeding by step makes a resumed run see the same batches as an uninterrupted one.
        torch.manual_seed(seed * 1_000_003 + step)
        rate = LEARNING_RATE * learning_rate_share(step, steps, WARM_UP, DECAY_SHARE)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(latents), (batch,))
        rows = choose_captions(scenes[chosen], scene_count)
        loss = flow_loss(text_encoder, transformer, latents[chosen], ids[rows], mask[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
        optimizer.step()
        averages.update(step)
        progress.add(step, loss=loss.item(), gradient=float(norm), rate=rate)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomically(
                {
                    "text_encoder": text_encoder.state_dict(),
                    "transformer": transformer.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averages": averages.averages,
                    "step": step + 1,
                },
                path,
            )
            averages.swap()
            export(text_encoder, transformer, step + 1)
            averages.swap()
    averages.swap()
    return text_encoder.eval(), transformer.eval()
