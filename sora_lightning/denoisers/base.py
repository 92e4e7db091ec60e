"""The interface of denoiser networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.configuration import KeepsArguments
from sora_lightning.denoisers.conditions import ConditionInput
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, Latents, PackedLatents, dense_groups


class Denoiser(KeepsArguments, nn.Module, ABC):
    """A network that predicts from noisy latents, which it cuts into patches of ``patch``.

    ``drops_tokens`` says whether it can leave out tokens that are not ``shown`` in a pack,
    ``self_conditioning`` whether ``forward`` takes an estimate of the data as fourth argument.
    """

    drops_tokens = False
    self_conditioning = False

    def __init__(self, patch: Patch):
        super().__init__()
        self.patch = patch

    @property
    def condition_input(self) -> ConditionInput | None:
        """The part that reads the condition; ``None`` for a network that does so itself."""
        return None

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"] | PackedLatents:
        """Return the prediction at noisy latents ``x_t`` and time ``t`` (0 = data, 1 = noise).

        ``x_t`` is a batch of clips of one size, or a pack of clips of any sizes; the prediction is
        of the same kind. ``condition`` has a row for each clip. ``t`` holds a time for each clip,
        ``b``, or one for each token: ``b n`` for a batch, ``n`` for a pack, one clip after the
        other. Tokens are frame-major; known ones have time 0. Tokens of a pack that are not
        ``shown`` are left out, and the prediction is 0 there.
        """

    def factory(self, latent_channels: int, condition_width: int) -> partial[Denoiser]:
        """Return what builds such a denoiser for a tokenizer and a conditioner of these widths.

        Raises ``ValueError`` where this one was built for others.
        """
        wanted = {"latent_channels": latent_channels, "condition_width": condition_width}
        for name, width in wanted.items():
            if self.arguments[name] != width:
                raise ValueError(
                    f"denoiser.{name} = {self.arguments[name]}: the tokenizer has "
                    f"{latent_channels} latent channels, and the conditioner a width of "
                    f"{condition_width}"
                )
        return partial(type(self), **{k: v for k, v in self.arguments.items() if k not in wanted})

    def num_tokens(self, x_t: Latents) -> list[int]:
        """Number of tokens of each clip."""
        groups = dense_groups(x_t)
        return [self.patch.grid(*x.shape[2:]).num_tokens for x in groups for _ in range(len(x))]


def clip_by_clip(
    denoiser: Denoiser, x_t: PackedLatents, t: Float[Tensor, " times"], condition: Condition
) -> PackedLatents:
    """Predict for a pack by one call of ``denoiser`` for each clip.

    Raises ``ValueError`` where tokens are dropped.
    """
    if x_t.shown is not None:
        raise ValueError(f"{type(denoiser).__name__} cannot do without some of a clip's tokens")
    times = t[:, None].unbind() if len(t) == len(x_t) else t.split(denoiser.num_tokens(x_t))
    outputs = [
        denoiser(clip[None], time if time.numel() == 1 else time[None], condition[i : i + 1])
        for i, (clip, time) in enumerate(zip(x_t.clips, times, strict=True))
    ]
    return PackedLatents(tuple(output[0] for output in outputs))
