"""A network of diffusers behind the interface of denoisers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sora_lightning.denoisers.base import Denoiser, clip_by_clip
from sora_lightning.diffusers_folders import Config, diffusers_class
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, PackedLatents

# Of the schedules and of the flow's times, which the pipelines multiply by it.
NUM_STEPS = 1000


class PretrainedDenoiser(Denoiser):
    """A network of diffusers behind the interface of denoisers.

    What it predicts is in its scheduler's configuration:
    ``sora_lightning.diffusion.pretrained_objective``.

    ``times_of_tokens`` says whether it takes a time of each token, ``takes_frames`` whether known
    frames are channels beside the latents, and ``learned_variance`` whether it predicts the
    variance too, in the second half of its channels. ``latent_channels`` are those of the latents
    that it takes.

    Args:
        config: The network's configuration, as its ``config.json`` has it.
        activation_checkpointing: Recompute each block in the backward pass.
        fps: Frames per second of the clips, which some networks take.

    Raises ``ValueError`` for a network of other channels, or one that cannot recompute its blocks.
    """

    network_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    times_of_tokens: ClassVar[bool] = False
    takes_frames: bool = False
    learned_variance: ClassVar[bool] = False

    def __init__(self, config: Config, activation_checkpointing: bool, fps: float):
        network = diffusers_class(self.network_class).from_config(config)
        super().__init__(self.patch_of(network.config))
        self.latent_channels = network.config.in_channels - self.concat_channels_of(network.config)
        takes, gives = self.latent_channels, network.config.out_channels
        if gives not in (None, takes, 2 * takes if self.learned_variance else takes):
            raise ValueError(
                f"{self.network_class} takes {takes} channels and predicts {gives}: only networks "
                "from text to video, and Wan's from image to video, are supported"
            )
        self.network = network
        self.activation_checkpointing, self.fps = activation_checkpointing, fps
        self.specification: dict[str, Any] = {}
        self.set_activation_checkpointing()

    def set_activation_checkpointing(self) -> None:
        """Make the network recompute its blocks, if ``activation_checkpointing`` says so."""
        if not self.activation_checkpointing:
            return
        if not self.has_checkpointing:
            raise ValueError(
                f"activation_checkpointing: {self.network_class} cannot recompute its blocks"
            )
        self.network.enable_gradient_checkpointing()

    @property
    def has_checkpointing(self) -> bool:
        """Return True if the network can recompute its blocks."""
        return self.network._supports_gradient_checkpointing

    def factory(self, latent_channels: int, condition_width: int) -> partial[Denoiser]:
        """See ``Denoiser``."""
        for what, ours, theirs in (
            ("the tokenizer has {} latent channels", latent_channels, self.latent_channels),
            ("the conditioner's tokens have width {}", condition_width, self.text_width),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{what.format(ours)}, and this {self.network_class} takes {theirs}"
                )
        made_by: type[Denoiser] = type(self)
        return partial(made_by, **self.arguments)

    @staticmethod
    def concat_channels_of(config: Any) -> int:
        """Return how many channels of such a network's input stand beside the latents."""
        return 0

    @staticmethod
    @abstractmethod
    def patch_of(config: Any) -> Patch:
        """Return the patch of a network of this configuration."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the text tokens that the network takes."""

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """Return the network's prediction for a batch of clips of one size."""

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
    ) -> Float[Tensor, "b c f h w"] | PackedLatents:
        """See ``Denoiser.forward``. Clips of a pack are seen one by one.

        Raises ``ValueError`` for a time of each token where the network takes one of each clip, and
        for channels beside the latents where it takes none.
        """
        if isinstance(x_t, PackedLatents):
            return clip_by_clip(self, x_t, t, condition)
        if condition.concat_latents is not None and not self.takes_frames:
            raise ValueError(f"{self.network_class} takes no channels beside the latents")
        if t.ndim > 1 and not self.times_of_tokens:
            raise ValueError(
                f"{self.network_class} takes one time for each clip: known frames at time zero are "
                "not for it"
            )
        dtype = self.network.dtype
        frames = condition.concat_latents
        condition = replace(
            condition,
            tokens=condition.tokens.to(dtype),
            pooled=condition.pooled.to(dtype),
            concat_latents=None if frames is None else frames.to(dtype),
        )
        return self.predict(x_t.to(dtype), t, condition).to(x_t.dtype)


def step_from_0(t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return the steps that a discrete schedule counts from 0: step n has time (n + 1) / 1000."""
    return t * NUM_STEPS - 1


def exactly(length: int, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b n d"]:
    """Return the tokens with zeros appended up to ``length``. ``ValueError`` for more of them."""
    missing = length - tokens.shape[1]
    if missing < 0:
        raise ValueError(
            f"{tokens.shape[1]} text tokens, and the network takes {length}: set the conditioner's "
            f"max_tokens to {length}"
        )
    zero = tokens.new_zeros(())
    return torch.cat(
        [tokens, repeat(zero, "-> b n d", b=len(tokens), n=missing, d=tokens.shape[2])], 1
    )
