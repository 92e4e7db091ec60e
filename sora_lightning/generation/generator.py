"""Prompt to latents to video: noise, guided sampling in latent space, decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_in
from sora_lightning.conditioning import (
    Conditioner,
    KnownFrameConditioning,
    KnownFrames,
    LatentSpace,
    TimeZeroConditioning,
)
from sora_lightning.conditioning.known_frames import Wrapper
from sora_lightning.denoisers import Denoiser
from sora_lightning.diffusion import (
    Autoguidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    Process,
    ReplaceKnown,
    SelfConditioned,
    TwoConditionGuidance,
    flow_edit,
)
from sora_lightning.generation.sampling_config import SAMPLERS, SamplingConfig
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import DenoiserFunction, TokenGrid, VideoSize


def seeded_noise(
    seeds: list[int], channels: int, grid: TokenGrid
) -> Float[Tensor, "b {channels} f h w"]:
    """Draw standard normal latents, each clip's from its own seed."""
    return _noise(_make_rngs(seeds), channels, grid)


def _make_rngs(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _noise(rngs: list[torch.Generator], channels: int, grid: TokenGrid) -> Tensor:
    shape = (channels, grid.f, grid.h, grid.w)
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


@dataclass(frozen=True)
class InitLatents:
    """Latents that sampling starts from, with noise of a later start time (SDEdit, arXiv
    2108.01073).

    The last ``strength`` of the steps are taken; 1 keeps nothing of the latents.
    """

    latents: Float[Tensor, "b c f h w"]
    strength: float

    def __post_init__(self) -> None:
        require_in("(0, 1]", strength=self.strength)


@dataclass(frozen=True)
class WeakModel:
    """A weaker model on the same latents for autoguidance. It reads prompts by its own
    conditioner.
    """

    conditioner: Conditioner
    denoiser: Denoiser

    def under(self, prompts: list[str], process: Process) -> DenoiserFunction:
        """Return its denoiser for one run under these prompts; the condition of a call is
        ignored.
        """
        condition = self.conditioner(prompts)
        network = _fed_back(self.denoiser, self.denoiser, process)
        return lambda x_t, t, _: network(x_t, t, condition)


def _fed_back(network: DenoiserFunction, denoiser: Denoiser, process: Process) -> DenoiserFunction:
    """Feed a self-conditioned denoiser's estimates back to it during one run. ``network`` calls
    it.
    """
    if not denoiser.self_conditioning:
        return network
    return SelfConditioned(network, process, denoiser.patch)


@dataclass(frozen=True)
class VideoGenerator:
    """A trained model and how to sample from it.

    ``training_shift`` gives the shift of the training's times for a number of tokens.
    ``known_frames`` shows known frames to the denoiser as in its training. ``weak_model`` is the
    loaded ``sampling.guidance.weak_model``.
    """

    tokenizer: VideoTokenizer
    conditioner: Conditioner
    denoiser: Denoiser
    process: Process = field(default_factory=Process)
    training_shift: Callable[[int], float] = lambda num_tokens: 1.0
    known_frames: KnownFrameConditioning = field(default_factory=TimeZeroConditioning)
    weak_model: WeakModel | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        channels, available = self.sampling.guidance.channels, self.tokenizer.latent_channels
        if channels is not None and channels > available:
            raise ValueError(f"guidance.channels = {channels}: the latents have {available}")
        # A grid that does not fit the path is refused here, before anything is sampled.
        self.sampling.time_grid.times(self.sampling.num_steps, self.process.path, lambda: 1.0)

    def videos(
        self, prompts: list[str], size: VideoSize, seeds: list[int]
    ) -> Float[Tensor, "b 3 F H W"]:
        """Sample videos in [-1, 1], one for each prompt and seed.

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
        init: InitLatents | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """Sample normalised latents on a latent grid. Known ones are returned unchanged."""
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt"
            )
        condition = self.conditioner(prompts)
        rngs = _make_rngs(seeds)
        noise = _noise(rngs, self.tokenizer.latent_channels, grid).to(condition.pooled)
        times = self._times(grid, 1.0 if init is None else init.strength)
        x = torch.zeros_like(noise) if init is None else init.latents.to(noise)
        x = self.process.path.perturb(x, noise, times[:1].expand(len(x)).to(x))

        def noise_fn(like: Tensor) -> Tensor:
            return _noise(rngs, like.shape[1], grid).to(like)

        guided = self._guided(prompts, known, noise, noise_fn)
        sampler = SAMPLERS[self.sampling.sampler]
        x = sampler(guided, x, times, condition, self.process, noise_fn)
        if known is None or not known.keep:
            return x
        kept = known.known(self.denoiser.patch, x.device)
        return kept.place(x, known.latents.to(x))

    def edited(
        self,
        prompts: list[str],
        sources: list[str],
        seeds: list[int],
        init: InitLatents,
        source_guidance: float,
    ) -> Float[Tensor, "b c f h w"]:
        """Edit latents that ``sources`` describe into what the prompts say (``flow_edit``)."""
        x_0, rngs = init.latents, _make_rngs(seeds)
        grid = TokenGrid(*x_0.shape[2:])
        # Source and target each see their own estimates.
        source, target = (_fed_back(self.denoiser, self.denoiser, self.process) for _ in range(2))
        denoisers = (
            self._by_text(source, sources, source_guidance),
            self._by_text(target, prompts, self.sampling.guidance.scale),
        )
        conditions = self.conditioner(sources), self.conditioner(prompts)

        def noise_fn(like: Tensor) -> Tensor:
            return _noise(rngs, like.shape[1], grid).to(like)

        times = self._times(grid, init.strength)
        return flow_edit(denoisers, conditions, x_0, times, self.process, noise_fn)

    def _times(self, grid: TokenGrid, strength: float) -> Float[Tensor, " s"]:
        """Return the last of the sampler's times, the share ``strength`` of its steps."""
        num_steps = self.sampling.num_steps

        def shift() -> float:
            tokens = self.denoiser.patch.grid(grid.f, grid.h, grid.w)
            return self.training_shift(tokens.num_tokens)

        times = self.sampling.time_grid.times(num_steps, self.process.path, shift)
        return times[num_steps - max(1, int(num_steps * strength)) :]

    def _guided(
        self,
        prompts: list[str],
        frames: KnownFrames | None,
        noise: Float[Tensor, "b c f h w"],
        noise_fn: Callable[[Tensor], Tensor],
    ) -> DenoiserFunction:
        """Return the denoiser of one sampling run.

        Guidance goes around known frames, these around self-conditioning, and that around a cache.
        """
        guidance, cache = self.sampling.guidance, self.sampling.cache
        network: DenoiserFunction
        network = self.denoiser if cache.interval == 1 else cache.around(self.denoiser)
        network = _fed_back(network, self.denoiser, self.process)
        if frames is None:
            return self._by_text(network, prompts, guidance.scale)
        codec = self.tokenizer.decode, self.tokenizer.encode
        space = LatentSpace(self.process, self.denoiser.patch, *codec)
        with_frames = self.known_frames.wrapper(frames, noise, noise_fn, space)
        guided: DenoiserFunction
        if guidance.frame_guidance is None:
            guided = self._by_text(network, prompts, guidance.scale, with_frames)
        else:
            null = self.conditioner.null(len(prompts))
            scales = guidance.frame_guidance, guidance.scale
            guided = TwoConditionGuidance(with_frames(network), network, null, *scales)
        if not frames.keep:
            return guided
        known = frames.known(space.patch, noise.device)
        return ReplaceKnown(guided, self.process, known, frames.latents.to(noise))

    def _by_text(
        self,
        denoiser: DenoiserFunction,
        prompts: list[str],
        scale: float,
        with_frames: Wrapper = lambda denoiser: denoiser,
    ) -> DenoiserFunction:
        """Guide a denoiser by the prompts, or away from the weak model."""
        guidance = self.sampling.guidance
        denoiser = with_frames(denoiser)
        guided: DenoiserFunction
        if self.weak_model is not None:
            guided = Autoguidance(
                denoiser, with_frames(self.weak_model.under(prompts, self.process)), scale
            )
        else:
            null = self.conditioner.null(len(prompts))
            guided = ClassifierFreeGuidance(
                denoiser, null, scale, guidance.rescale, guidance.channels
            )
        if guidance.interval == (0, 1):
            return guided
        return GuidanceInterval(guided, denoiser, *guidance.interval)
