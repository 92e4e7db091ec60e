"""Conditioning on known frames, by one interface for training and sampling.

Known latents are seen at diffusion time 0, or concatenated to the input's channels, with or without
tokens of the first frame beside those of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_lightning.checks import require_at_least, require_in
from sora_lightning.conditioning.images import ImageEncoder
from sora_lightning.conditioning.masks import NUM_UNIFORMS, FrameMask, VideoEditing, draw_known
from sora_lightning.configuration import KeepsArguments, configuration
from sora_lightning.diffusion import Known, Process
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, DenoiserFunction, Draws, Latents, dense_groups

NoiseFunction = Callable[[Tensor], Tensor]
Wrapper = Callable[[DenoiserFunction], DenoiserFunction]


@dataclass(frozen=True)
class LatentSpace:
    """Diffusion process, patch and codec of the latents, as known frames need them."""

    process: Process
    patch: Patch
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KnownFrames:
    """Latents of a whole clip and the mask of those that are known, for sampling.

    ``noise`` is the diffusion time at which the network sees them: a little noise hides the faults
    of frames that it made itself. With ``keep`` the sample holds them unchanged; without, they are
    the source of an edit and made anew.
    """

    latents: Float[Tensor, "b c f h w"]
    mask: Bool[Tensor, "b 1 f h w"]
    noise: float = 0.0
    keep: bool = True

    def __post_init__(self) -> None:
        require_in("[0, 1)", where="known frames: ", noise=self.noise)

    def known(self, patch: Patch, device: torch.device) -> Known:
        """Return the known positions in whole tokens of ``patch``."""
        t = torch.full((len(self.mask),), self.noise, device=device)
        return Known.of(self.mask.to(device), patch, t)


class KnownFrameConditioning(KeepsArguments, nn.Module, ABC):
    """Shows known frames to a denoiser.

    In training a mask is drawn for each clip from ``masks`` by their weights; without masks nothing
    is ever known. A system calls ``build`` once, before anything else.
    """

    supports_packing: ClassVar[bool] = True

    def __init__(self, masks: Sequence[FrameMask] = ()):
        super().__init__()
        self.masks = list(masks)
        self.image_encoder: ImageEncoder | None = None
        if self.masks and sum(mask.weight for mask in self.masks) <= 0:
            raise ValueError(f"masks = {self.masks}: the weights must not all be 0")

    def build(self, latent_channels: int, width: int, drop_text: float) -> KnownFrameConditioning:
        """Make what depends on the latents' channels, on the conditioner's width and on the share
        of clips that train without text.
        """
        return self

    @property
    def specification(self) -> dict[str, Any] | None:
        """The ``class_path`` and ``init_args`` of this part where its image encoder was loaded from
        a folder, whose own configuration then takes the factory's place.
        """
        if self.image_encoder is None or self.image_encoder.specification is None:
            return None
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        arguments = self.arguments | {"image_encoder": self.image_encoder.specification}
        return {"class_path": path, "init_args": configuration(arguments, "known_frames")}

    @property
    def needs_source(self) -> bool:
        """Return True if the training learns edits: clips then come with their source."""
        return any(isinstance(mask, VideoEditing) for mask in self.masks)

    def draw(self, x_0: Latents, patch: Patch, rng: Draws) -> list[Known] | None:
        """Draw the known tokens of each dense group; ``None`` without masks."""
        if not self.masks:
            return None
        groups = dense_groups(x_0)
        uniforms = rng.uniform(NUM_UNIFORMS).split([len(x) for x in groups])
        return [draw_known(self.masks, patch, x, u) for x, u in zip(groups, uniforms, strict=True)]

    @abstractmethod
    def forward(
        self,
        text: Condition,
        x_0: Latents,
        source: Float[Tensor, "b c f h w"] | None,
        uniforms: Float[Tensor, " b"],
        rng: Draws,
        space: LatentSpace,
    ) -> tuple[Condition, list[Known] | None]:
        """Return the condition of a training step, and what the objective takes as known.

        ``uniforms`` decided which clips lost their text: those below ``drop_text``. ``source``
        holds the latents of the clips that these are edits of.
        """

    @abstractmethod
    def wrapper(
        self,
        frames: KnownFrames,
        noise: Float[Tensor, "b c f h w"],
        noise_fn: NoiseFunction,
        space: LatentSpace,
    ) -> Wrapper:
        """Return a function from a denoiser to one that sees ``frames``, for one sampling run.

        ``noise`` is that of the sample; ``noise_fn`` draws more. Guidance may go around the result
        and repeat the batch.
        """

    def with_source(
        self, text: Condition, source: Float[Tensor, "b c f h w"] | None, space: LatentSpace
    ) -> Condition:
        """Return the condition of a validation step: the text, and the source of an edit."""
        return text


class TimeZeroConditioning(KnownFrameConditioning):
    """Known tokens are seen at diffusion time 0, or a little later where a mask has ``noise``.

    The loss is that of the other tokens. Raises ``ValueError`` for a mask that needs a source.
    """

    def __init__(self, masks: Sequence[FrameMask] = ()):
        super().__init__(masks)
        if self.needs_source:
            raise ValueError(
                "masks has VideoEditing: a source is shown by channels; take ConcatConditioning"
            )

    def forward(
        self,
        text: Condition,
        x_0: Latents,
        source: Float[Tensor, "b c f h w"] | None,
        uniforms: Float[Tensor, " b"],
        rng: Draws,
        space: LatentSpace,
    ) -> tuple[Condition, list[Known] | None]:
        """See ``KnownFrameConditioning``."""
        return text, self.draw(x_0, space.patch, rng)

    def wrapper(
        self,
        frames: KnownFrames,
        noise: Float[Tensor, "b c f h w"],
        noise_fn: NoiseFunction,
        space: LatentSpace,
    ) -> Wrapper:
        """See ``KnownFrameConditioning``. ``ValueError`` for the source of an edit."""
        if not frames.keep:
            raise ValueError("a source is shown by channels beside the latents: here are none")
        known, x_0 = frames.known(space.patch, noise.device), frames.latents.to(noise)

        def around(denoiser: DenoiserFunction) -> DenoiserFunction:
            def conditioned(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                n = len(x_t) // len(x_0)
                data, e = (repeat(x, "b ... -> (n b) ...", n=n) for x in (x_0, noise))
                x_t, times = known.repeat(n).insert(space.process, x_t, t, data, e)
                return denoiser(x_t, times, condition)

            return conditioned

        return around


def clips_with_image(mask: Bool[Tensor, "b 1 f h w"], name: str) -> Bool[Tensor, " b"]:
    """Return the clips whose whole first frame is known.

    Raises ``ValueError`` with ``name`` where anything else is known.
    """
    has_image = mask[:, :, :1].flatten(1).all(1)
    only_first = torch.zeros_like(mask)
    only_first[:, :, :1] = rearrange(has_image, "b -> b 1 1 1 1")
    if not torch.equal(mask, only_first):
        raise ValueError(
            f"{name} shows the first latent frame alone: the masks must be TextToVideo and "
            "FirstFrames with most = 1, and the context one frame"
        )
    return has_image


class ConcatChannels(ABC):
    """Makes channels of known latents. A clip of which nothing is known has zeros."""

    @abstractmethod
    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        """Return as many channels as the latents have, and one for what is known. Nothing of the
        latents outside of ``mask`` may show.
        """


@dataclass(frozen=True)
class MaskedLatents(ConcatChannels):
    """The known latents with zeros elsewhere, and the mask (W.A.L.T, arXiv 2312.06662, section
    3.3), for any mask.
    """

    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        return torch.cat([torch.where(mask, latents, 0), mask.to(latents)], dim=1)


@dataclass(frozen=True)
class FirstFrameAndPosition(ConcatChannels):
    """The first frame's latents, then each frame's position from 0 to 1 in all channels (the
    public I2VGen-XL, arXiv 2311.04145), for image to video. The last channel is 1 where there is an
    image.

    Raises ``ValueError`` for a clip of which anything but the whole first frame is known.
    """

    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        b, c, f, h, w = latents.shape
        has_image = clips_with_image(mask, "FirstFrameAndPosition")
        positions = (torch.arange(f, device=latents.device) / max(f - 1, 1)).to(latents)
        positions = repeat(positions, "f -> b c f h w", b=b, c=c, h=h, w=w)
        channels = torch.cat([latents[:, :, :1], positions[:, :, 1:]], dim=2)
        shown = rearrange(has_image.to(latents), "b -> b 1 1 1 1")
        return torch.cat([channels * shown, torch.ones_like(channels[:, :1]) * shown], dim=1)


class ConcatConditioning(KnownFrameConditioning):
    """Concatenates known latents to the denoiser's input channels; all tokens are noisy and count.

    ``image_encoder``, a factory as a system's denoiser is, adds tokens of a known first frame to
    those of the text. ``drop_frames`` is the share of clips that train without frames, and
    ``drop_both`` that without text and frames, by one draw (InstructPix2Pix, arXiv 2211.09800,
    section 3.2.1): sampling can then weigh the two apart. The masks' ``VideoEditing`` shows the
    source of an edit in place of the clip.
    """

    supports_packing = False

    def __init__(
        self,
        masks: Sequence[FrameMask],
        channels: ConcatChannels | None = None,
        image_encoder: Callable[[int, int], ImageEncoder] | None = None,
        drop_frames: float = 0.05,
        drop_both: float = 0.05,
    ):
        super().__init__(masks)
        if not self.masks:
            raise ValueError("masks is empty: nothing would ever be known")
        require_at_least(0, drop_frames=drop_frames, drop_both=drop_both)
        self.channels = channels or MaskedLatents()
        self.drop_frames, self.drop_both = drop_frames, drop_both
        self._image_encoder_factory = image_encoder
        self.drop_text = drop_both

    def build(self, latent_channels: int, width: int, drop_text: float) -> KnownFrameConditioning:
        """Make the image encoder. ``ValueError`` for shares that do not fit ``drop_text``."""
        if self.drop_both > drop_text or drop_text + self.drop_frames >= 1:
            raise ValueError(
                f"drop_condition = {drop_text}: must be at least drop_both = {self.drop_both}, and "
                f"less than 1 together with drop_frames = {self.drop_frames}"
            )
        self.drop_text = drop_text
        if self._image_encoder_factory is not None:
            self.image_encoder = self._image_encoder_factory(latent_channels, width)
        return self

    def without_frames(self, uniforms: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Return which clips train without frames; the first ``drop_both`` of them lost their text
        too.
        """
        start, end = self.drop_text - self.drop_both, self.drop_text + self.drop_frames
        return (uniforms >= start) & (uniforms < end)

    def forward(
        self,
        text: Condition,
        x_0: Latents,
        source: Float[Tensor, "b c f h w"] | None,
        uniforms: Float[Tensor, " b"],
        rng: Draws,
        space: LatentSpace,
    ) -> tuple[Condition, list[Known] | None]:
        """See ``KnownFrameConditioning``. The frames carry noise of their own."""
        assert isinstance(x_0, Tensor)
        known_groups = self.draw(x_0, space.patch, rng)
        assert known_groups is not None
        (known,) = known_groups
        latents = x_0
        if source is not None:
            is_edit = rearrange(known.mask.flatten(1).all(1), "b -> b 1 1 1 1")
            latents = torch.where(is_edit, source, x_0)
        latents = space.process.path.perturb(latents, rng.noise(x_0), known.t)
        has_frames = rearrange(~self.without_frames(uniforms), "b -> b 1 1 1 1")
        return self.concatenated(text, latents, known.mask & has_frames, space), None

    def shown(
        self,
        latents: Float[Tensor, "b c f h w"],
        mask: Bool[Tensor, "b 1 f h w"],
        space: LatentSpace,
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        """Return the channels of known latents."""
        return self.channels(latents, mask)

    def concatenated(
        self,
        text: Condition,
        latents: Float[Tensor, "b c f h w"],
        mask: Bool[Tensor, "b 1 f h w"],
        space: LatentSpace,
    ) -> Condition:
        """Return the condition with known latents as channels, and their image tokens."""
        condition = replace(text, concat_latents=self.shown(latents, mask, space))
        if self.image_encoder is None:
            return condition
        return condition.joined(self.image_encoder.known(latents, mask, space.decode))

    def wrapper(
        self,
        frames: KnownFrames,
        noise: Float[Tensor, "b c f h w"],
        noise_fn: NoiseFunction,
        space: LatentSpace,
    ) -> Wrapper:
        """See ``KnownFrameConditioning``. With the sample's own noise, what is to be removed from
        the sample would remain in the frames, so they get other noise.
        """
        known, x_0 = frames.known(space.patch, noise.device), frames.latents.to(noise)
        latents = space.process.path.perturb(x_0, noise_fn(noise), known.t)
        channels, tokens = self.shown(latents, known.mask, space), None
        if self.image_encoder is not None:
            tokens = self.image_encoder.known(latents, known.mask, space.decode)

        def around(denoiser: DenoiserFunction) -> DenoiserFunction:
            def conditioned(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                n = len(x_t) // len(channels)
                repeated = repeat(channels, "b ... -> (n b) ...", n=n)
                condition = replace(condition, concat_latents=repeated)
                if tokens is not None:
                    condition = condition.joined(tokens.repeat(n))
                return denoiser(x_t, t, condition)

            return conditioned

        return around

    def with_source(
        self, text: Condition, source: Float[Tensor, "b c f h w"] | None, space: LatentSpace
    ) -> Condition:
        """See ``KnownFrameConditioning``."""
        if source is None:
            return text
        return self.concatenated(text, source, torch.ones_like(source[:, :1]).bool(), space)
