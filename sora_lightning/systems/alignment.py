"""Alignment of a denoiser's tokens with a frozen video encoder (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.captioner import VideoEncoder
from sora_lightning.checks import require_at_least
from sora_lightning.configuration import KeepsArguments, configuration
from sora_lightning.denoisers import Denoiser, DiT
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.systems.captioner import CaptionerSystem
from sora_lightning.types import TokenGrid

Tokens = tuple[Tensor, PackedSequence]
"""Tokens ``b n d`` of a denoiser, and their sequence."""


def load_video_encoder(checkpoint: Path) -> VideoEncoder:
    """Return the video encoder of a captioner's checkpoint, with averaged weights.

    Raises ``ValueError`` if the file is missing or holds no captioner.
    """
    return CaptionerSystem.from_checkpoint(checkpoint).captioner.encoder


class RepresentationAlignment(KeepsArguments, nn.Module):
    """Negative cosine similarity between a denoiser's tokens after a block, projected by a
    perceptron of three layers, and a frozen encoder's features of the clean clip (REPA, equation
    8).

    The encoder sees pixels, and latents from a cache are decoded for it. Frames are picked, and
    pixels scaled, to the nearest size that its tubelets divide. Its features are interpolated to
    the denoiser's tokens.

    Args:
        encoder: The frozen encoder, such as ``load_video_encoder`` reads from a captioner. Its
            weights travel in the system's checkpoint.
        block: Number of blocks before the tokens; REPA takes 4 of 12, or 8 of 24 or 28.
        weight: Factor of the loss in the denoiser's gradient; 0.5 in the paper. The projector
            learns at factor 1, so that 0 measures what tokens say of the features. Its gradient
            counts in the norm that gradients are clipped to.
        frame_stride: Every so many frames of a clip are one of the encoder's, which may have been
            trained at fewer frames per second.
        hidden_width: Width of the projector; 2048 in the paper.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        block: int,
        weight: float = 0.5,
        frame_stride: int = 1,
        hidden_width: int = 2048,
    ):
        super().__init__()
        require_at_least(1, where="alignment.", block=block, frame_stride=frame_stride)
        require_at_least(0, where="alignment.", weight=weight)
        self.encoder = encoder.requires_grad_(False)
        self.block = block
        self.weight = weight
        self.frame_stride = frame_stride
        self.hidden_width = hidden_width

    @property
    def specification(self) -> dict[str, Any]:
        """The ``class_path`` and ``init_args`` of this part; the encoder has its own."""
        encoder = configuration(self.encoder, "alignment.encoder")
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class_path": path, "init_args": {**self.arguments, "encoder": encoder}}

    def build(self, denoiser: Denoiser) -> RepresentationAlignment:
        """Make the projector of the tokens of ``denoiser``.

        Raises ``ValueError`` if it is no ``DiT``, or has fewer blocks.
        """
        if not isinstance(denoiser, DiT):
            raise ValueError(
                f"alignment: needs a DiT, and the denoiser is a {type(denoiser).__name__}"
            )
        if self.block > len(denoiser.blocks):
            raise ValueError(
                f"alignment.block = {self.block}: the denoiser has {len(denoiser.blocks)} blocks"
            )
        hidden = self.hidden_width
        self.projector = nn.Sequential(
            nn.Linear(denoiser.x_in.out_features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, self.encoder.width),
        )
        return self

    @contextmanager
    def observe(self, denoiser: Denoiser) -> Iterator[list[Tokens]]:
        """Yield a list that holds the tokens after the block of the denoiser's last call."""
        observed: list[Tokens] = []

        def keep(_block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> None:
            sequence = inputs[1].sequence
            observed[:] = [(tokens, sequence)]

        assert isinstance(denoiser, DiT)
        handle = denoiser.blocks[self.block - 1].register_forward_hook(keep)
        try:
            yield observed
        finally:
            handle.remove()

    def forward(
        self, observed: Tokens, clips: Sequence[Float[Tensor, "b 3 _F _H _W"]]
    ) -> Float[Tensor, " clips"]:
        """Return the mean of the negative cosine similarity over each clip's tokens.

        ``clips`` are pixels in [-1, 1]: one batch, or a batch of one for each clip of a pack.
        """
        tokens, sequence = observed
        tokens = sequence.remove_context(sequence.all_tokens(tokens))
        tokens = torch.lerp(tokens.detach(), tokens, self.weight)  # the value is that of tokens
        with torch.no_grad():
            features = [
                self.features(clip, grid) for clip, grid in zip(clips, sequence.grids, strict=True)
            ]
        target = torch.cat(sequence.select(features), dim=1)  # b n e
        similarity = F.cosine_similarity(self.projector(tokens).float(), target, dim=-1)  # b n
        if not sequence.is_packed:
            return -similarity.mean(1)
        return -torch.stack([x.mean() for x in similarity[0].split(sequence.num_tokens)])

    def features(
        self, pixels: Float[Tensor, "b 3 F H W"], grid: TokenGrid
    ) -> Float[Tensor, "b {grid.num_tokens} e"]:
        """Return the encoder's features at the tokens of ``grid``."""
        tubelet = self.encoder.compression
        num_frames, *size = pixels.shape[2:]
        steps = round((num_frames - 1) / self.frame_stride / tubelet.frames)
        chosen = torch.linspace(0, num_frames - 1, 1 + steps * tubelet.frames).round().long()
        frames = pixels[:, :, chosen.to(pixels.device)]
        height, width = (
            max(1, round(side / part)) * part
            for side, part in zip(size, (tubelet.height, tubelet.width), strict=True)
        )
        frames = F.interpolate(frames, (len(chosen), height, width), mode="trilinear")
        features, sequence = self.encoder.eval()(frames)
        (own,) = sequence.grids
        features = rearrange(features.float(), "b (f h w) e -> b e f h w", f=own.f, h=own.h)
        # The first frame is a latent frame of its own, so ends meet ends in time.
        over_time = (grid.f, own.h, own.w)
        features = F.interpolate(features, over_time, mode="trilinear", align_corners=True)
        features = F.interpolate(features, (grid.f, grid.h, grid.w), mode="trilinear")
        return rearrange(features, "b e f h w -> b (f h w) e")
