"""Prompt to video: noise, guided sampling in latent space, decoding."""

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.conditioning import Conditioner
from sora_lightning.diffusion import ClassifierFreeGuidance, Sampler, euler, uniform_times
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import DenoiserFunction, TokenGrid, VideoSize


def seeded_noise(
    seeds: list[int], channels: int, grid: TokenGrid
) -> Float[Tensor, "b {channels} f h w"]:
    """Standard normal latents, one generator a clip: a clip's noise does not depend on its
    neighbours.
    """
    shape = (channels, grid.f, grid.h, grid.w)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def generate(
    tokenizer: VideoTokenizer,
    conditioner: Conditioner,
    denoiser: DenoiserFunction,
    prompts: list[str],
    size: VideoSize,
    seeds: list[int],
    *,
    num_steps: int,
    guidance_scale: float,
    shift: float = 1.0,
    sampler: Sampler = euler,
) -> Float[Tensor, "b 3 F H W"]:
    """Videos in [-1, 1], one for each prompt and seed.

    The noise is drawn on the CPU from each clip's own seed, so a video is the same in any batch and
    on any device up to rounding. Raises ``ValueError`` for a size that the tokenizer's compression
    does not divide, or where prompts and seeds differ in number.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt"
        )
    condition = conditioner(prompts)
    grid = tokenizer.compression.grid(size)
    noise = seeded_noise(seeds, tokenizer.latent_channels, grid).to(condition.pooled)
    guided = ClassifierFreeGuidance(denoiser, conditioner.null(len(prompts)), guidance_scale)
    return tokenizer.decode(sampler(guided, noise, uniform_times(num_steps, shift), condition))
