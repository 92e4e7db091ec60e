"""Prompt to latents to video: noise, guided sampling in latent space, decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.conditioning import Conditioner, GivenChannels, PictureEncoder
from sora_lightning.denoisers import Denoiser, FeatureCaching
from sora_lightning.diffusion import (
    GuidanceRecipe,
    KeepKnown,
    Known,
    Process,
    Sampler,
    SeeKnown,
    TellKnown,
    TwoConditionGuidance,
    euler,
    flow_edit,
    uniform_times,
)
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import DenoiserFunction, TokenGrid, VideoSize


def seeded_noise(
    seeds: list[int], channels: int, grid: TokenGrid
) -> Float[Tensor, "b {channels} f h w"]:
    """Standard normal latents, one generator a clip: a clip's noise does not depend on its
    neighbours.
    """
    return _noise(_generators(seeds), channels, grid)


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _noise(generators: list[torch.Generator], channels: int, grid: TokenGrid) -> Tensor:
    shape = (channels, grid.f, grid.h, grid.w)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


@dataclass(frozen=True)
class KnownFrames:
    """Latents of a whole clip of which those in ``mask`` are to be kept. ``noise`` is the time that
    the network sees them at: a little noise hides the faults of frames that it made itself. Without
    ``keep`` they are told of and made anew: the source of an edit, for a network with channels.
    """

    latents: Float[Tensor, "b c f h w"]
    mask: Bool[Tensor, "b 1 f h w"]
    noise: float = 0.0
    keep: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise = {self.noise} on known frames: must lie in [0, 1)")


@dataclass(frozen=True)
class Draft:
    """Latents to begin from with noise of a later start (SDEdit, arXiv 2108.01073): the last
    ``strength`` of the steps are taken. 1 keeps nothing of them.
    """

    latents: Float[Tensor, "b c f h w"]
    strength: float

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength = {self.strength}: must lie in (0, 1]")


@dataclass(frozen=True)
class Guide:
    """A weaker model on the same latents, to be better than (autoguidance): it reads prompts by its
    own conditioner.
    """

    conditioner: Conditioner
    denoiser: Denoiser

    def told(self, prompts: list[str]) -> DenoiserFunction:
        """Its denoiser under these prompts, whatever condition it is given."""
        condition = self.conditioner(prompts)
        return lambda x_t, t, _: self.denoiser(x_t, t, condition)


@dataclass(frozen=True)
class VideoGenerator:
    """A trained model and how to sample from it.

    ``shift`` gives the shift of the sampler's times for a number of tokens. ``frame_guidance``, if
    set, is the weight of known frames beside that of the text, ``guidance_scale`` (InstructPix2Pix,
    arXiv 2211.09800): it takes three calls a step instead of two. ``channels`` tell of known frames
    where the denoiser was trained with them, in place of time 0, and ``picture`` tells of a first
    frame by tokens beside the text. ``caching`` leaves blocks out at some of the steps.
    ``guidance`` is how the text guides; ``guidance_scale`` is its weight, or with a ``guide`` the
    weight of being better than it. Neither has a part with ``frame_guidance``.
    """

    tokenizer: VideoTokenizer
    conditioner: Conditioner
    denoiser: Denoiser
    process: Process = field(default_factory=Process)
    shift: Callable[[int], float] = lambda num_tokens: 1.0
    sampler: Sampler = euler
    num_steps: int = 50
    guidance_scale: float = 2.0
    frame_guidance: float | None = None
    channels: GivenChannels | None = None
    caching: FeatureCaching | None = None
    guidance: GuidanceRecipe = field(default_factory=GuidanceRecipe)
    guide: Guide | None = None
    picture: PictureEncoder | None = None

    def videos(
        self, prompts: list[str], size: VideoSize, seeds: list[int]
    ) -> Float[Tensor, "b 3 F H W"]:
        """Videos in [-1, 1], one for each prompt and seed.

        The noise is drawn on the CPU from each clip's own seed, so a video is the same in any batch
        and on any device up to rounding. Raises ``ValueError`` for a size that the tokenizer's
        compression does not divide, or where prompts and seeds differ in number.
        """
        grid = self.tokenizer.compression.grid(size)
        return self.tokenizer.decode(self.latents(prompts, grid, seeds))

    def latents(
        self,
        prompts: list[str],
        grid: TokenGrid,
        seeds: list[int],
        known: KnownFrames | None = None,
        draft: Draft | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """Normalised latents on a latent grid; known ones come back as they are."""
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt"
            )
        condition = self.conditioner(prompts)
        generators = _generators(seeds)
        noise = _noise(generators, self.tokenizer.latent_channels, grid).to(condition.pooled)
        num_tokens = self.denoiser.patch.grid(grid.f, grid.h, grid.w).num_tokens
        times = uniform_times(self.num_steps, self.shift(num_tokens))
        path = self.process.path
        x = torch.zeros_like(noise)
        if draft is not None:
            times, x = self._times_of(draft, num_tokens), draft.latents.to(noise)
        x = path.perturb(x, noise, times[:1].expand(len(x)).to(x))

        def fresh(like: Tensor) -> Tensor:
            return _noise(generators, like.shape[1], grid).to(like)

        guided = self._guided(prompts, known, noise, fresh)
        x = self.sampler(guided, x, times, condition, self.process, fresh)
        if known is None or not known.keep:
            return x
        return self._known(known).place(x, known.latents.to(x))

    def edited(
        self,
        prompts: list[str],
        sources: list[str],
        seeds: list[int],
        draft: Draft,
        source_guidance: float,
    ) -> Float[Tensor, "b c f h w"]:
        """Latents of the draft, which ``sources`` describe, as the prompts say (``flow_edit``)."""
        x_0, generators = draft.latents, _generators(seeds)
        grid = TokenGrid(*x_0.shape[2:])
        num_tokens = self.denoiser.patch.grid(grid.f, grid.h, grid.w).num_tokens
        times = self._times_of(draft, num_tokens)
        denoisers = (
            self._by_text(self.denoiser, sources, source_guidance),
            self._by_text(self.denoiser, prompts, self.guidance_scale),
        )
        conditions = self.conditioner(sources), self.conditioner(prompts)

        def fresh(like: Tensor) -> Tensor:
            return _noise(generators, like.shape[1], grid).to(like)

        return flow_edit(denoisers, conditions, x_0, times, self.process, fresh)

    def _times_of(self, draft: Draft, num_tokens: int) -> Float[Tensor, " s"]:
        """The last of the sampler's times, as many as the draft's strength says."""
        first = self.num_steps - max(1, int(self.num_steps * draft.strength))
        return uniform_times(self.num_steps, self.shift(num_tokens))[first:]

    def _guided(
        self,
        prompts: list[str],
        frames: KnownFrames | None,
        noise: Float[Tensor, "b c f h w"],
        draw: Callable[[Tensor], Tensor],
    ) -> DenoiserFunction:
        # Guidance sees the network as one sampling run has it.
        network: DenoiserFunction
        network = self.denoiser if self.caching is None else self.caching.around(self.denoiser)
        if frames is None:
            return self._by_text(network, prompts, self.guidance_scale)
        known, latents = self._known(frames), frames.latents.to(noise)
        told: DenoiserFunction
        if self.channels is not None:
            # With noise of its own: what is taken away from the sample stays in what it is told.
            seen = self.process.path.perturb(latents, draw(noise), known.t)
            tokens = None
            if self.picture is not None:
                tokens = self.picture.known(seen, known.mask, self.tokenizer.decode)
            told = TellKnown(network, self.channels(seen, known.mask), tokens)
        elif not frames.keep:
            raise ValueError(
                "a source is told by channels beside the latents: this network has none"
            )
        else:
            told = SeeKnown(network, self.process, known, latents, noise)
        guided: DenoiserFunction
        if self.frame_guidance is not None:
            null = self.conditioner.null(len(prompts))
            scales = self.frame_guidance, self.guidance_scale
            guided = TwoConditionGuidance(told, network, null, *scales)
        elif isinstance(told, SeeKnown):
            inner = self._by_text(network, prompts, self.guidance_scale)
            guided = replace(told, denoiser=inner)
        else:
            guided = self._by_text(told, prompts, self.guidance_scale)
        return KeepKnown(guided, self.process, known, latents) if frames.keep else guided

    def _by_text(
        self, denoiser: DenoiserFunction, prompts: list[str], scale: float
    ) -> DenoiserFunction:
        null = self.conditioner.null(len(prompts))
        weaker = None if self.guide is None else self.guide.told(prompts)
        return self.guidance(denoiser, null, scale, weaker)

    def _known(self, frames: KnownFrames) -> Known:
        device = self.tokenizer.latent_mean.device
        t = torch.full((len(frames.mask),), frames.noise, device=device)
        return Known.of(frames.mask.to(device), self.denoiser.patch, t)


def generate(
    tokenizer: VideoTokenizer,
    conditioner: Conditioner,
    denoiser: Denoiser,
    prompts: list[str],
    size: VideoSize,
    seeds: list[int],
    *,
    num_steps: int,
    guidance_scale: float,
) -> Float[Tensor, "b 3 F H W"]:
    """Videos by a rectified flow's velocity: see ``VideoGenerator.videos``."""
    generator = VideoGenerator(
        tokenizer, conditioner, denoiser, num_steps=num_steps, guidance_scale=guidance_scale
    )
    return generator.videos(prompts, size, seeds)
