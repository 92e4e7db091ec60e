"""What a system asks of a denoiser network."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, Latents, PackedLatents


class Denoiser(nn.Module, ABC):
    """A network that is a ``DenoiserFunction`` over latents cut into patches of ``patch``.

    ``drops_tokens`` says whether its packed form can do without some of a clip's tokens.
    """

    drops_tokens = False

    def __init__(self, patch: Patch):
        super().__init__()
        self.patch = patch

    def __call__(
        self, x_t: Latents, t: Float[Tensor, " times *n"], condition: Condition, **more: Any
    ) -> Latents:
        """Return the prediction for a dense batch or a pack, as what it was given.

        ``t`` holds a time for each clip, or for each token: ``b n`` for a dense batch, ``n`` over
        all clips for a pack.
        """
        if isinstance(x_t, PackedLatents):
            return self.forward_packed(x_t, t, condition, **more)
        return super().__call__(x_t, t, condition, **more)

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"]:
        """The prediction at noisy latents ``x_t`` and time ``t`` (0 = data, 1 = noise).

        ``t`` holds a time for each clip, or one for each of its tokens, frame-major: known frames
        stand at 0.
        """

    def forward_packed(
        self, x_t: PackedLatents, t: Float[Tensor, " times"], condition: Condition
    ) -> PackedLatents:
        """The same prediction for clips of any sizes, each with its own time and its own row of
        ``condition``.

        ``t`` holds a time for each clip, or one for each token of all clips, one clip after the
        other. Where some latents are not ``shown``, their tokens are left out, and the prediction
        is 0 there. Here the clips run one by one, and dropping is refused with a ``ValueError``; a
        network that packs them overrides it.
        """
        if x_t.shown is not None:
            raise ValueError(f"{type(self).__name__} cannot do without some of a clip's tokens")
        times = t[:, None].unbind() if len(t) == len(x_t) else t.split(self.num_tokens(x_t))
        outputs = [
            self(clip[None], time if time.numel() == 1 else time[None], condition[i : i + 1])
            for i, (clip, time) in enumerate(zip(x_t.clips, times, strict=True))
        ]
        return PackedLatents(tuple(output[0] for output in outputs))

    def num_tokens(self, x_t: PackedLatents) -> list[int]:
        """How many tokens each clip becomes."""
        return [self.patch.grid(*clip.shape[1:]).num_tokens for clip in x_t.clips]
