"""Spacetime Diffusion Transformer: DiT (arXiv 2212.09748) on video latents of any size, for any
layout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.blocks import DiTBlock, FinalLayer, TimeEmbedding
from sora_lightning.denoisers.signal import BlockContext, Signal, Times
from sora_lightning.layers.arrangement import Arrangement
from sora_lightning.layers.partitions import AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.position import rotary_angles, sinusoidal_3d
from sora_lightning.types import Condition, PackedLatents


class DiT(Denoiser):
    """Patches of latents to tokens, blocks of attention in the chosen layout, tokens back to
    patches.

    ``latent_channels`` and ``condition_width`` come from the tokenizer and the conditioner; a
    system passes them. Positions are absolute sinusoids at the input and rotary angles in every
    attention, both from the coordinates, so that no size is built in. ``patch`` counts latent
    frames, rows and columns.
    """

    def __init__(
        self,
        latent_channels: int,
        condition_width: int,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patch: Sequence[int] = (1, 2, 2),
        layout: AttentionLayout | None = None,
    ):
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(
                f"patch = {list(patch)} must be three positive numbers: frames, rows, columns"
            )
        super().__init__(Patch(*patch))
        layout = layout or Joint()
        self.width = width
        self.head_width = width // num_heads
        self.x_in = nn.Linear(latent_channels * self.patch.volume, width)
        self.time = TimeEmbedding(width)
        self.text_in = nn.Linear(condition_width, width)
        self.pooled_in = nn.Linear(condition_width, width)
        schedule = layout.schedule(depth)
        blocks = [DiTBlock(width, num_heads, mlp_ratio, partitions) for partitions in schedule]
        self.blocks = nn.ModuleList(blocks)
        self.final = FinalLayer(width, latent_channels * self.patch.volume)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in blocks:
            block.zero_init()
        self.final.zero_init()

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"]:
        arrangement = Arrangement([self.patch.grid(*x_t.shape[2:])], x_t.device)
        y = self._predict(self.patch.patchify(x_t), t, condition, arrangement)
        return self.patch.unpatchify(y, arrangement.grids[0])

    def forward_packed(
        self, x_t: PackedLatents, t: Float[Tensor, " times"], condition: Condition
    ) -> PackedLatents:
        grids = [self.patch.grid(*clip.shape[1:]) for clip in x_t.clips]
        arrangement = Arrangement(grids, x_t.clips[0].device)
        x = torch.cat([self.patch.patchify(clip[None]) for clip in x_t.clips], dim=1)  # 1 n p
        if not arrangement.is_packed and len(t) > 1:
            t = t[None]
        y = self._predict(x, t, condition, arrangement)
        parts = zip(y.split(arrangement.lengths, dim=1), grids, strict=True)
        return PackedLatents(tuple(self.patch.unpatchify(part, grid)[0] for part, grid in parts))

    def _predict(
        self,
        x: Float[Tensor, "b n p"],
        t: Float[Tensor, "*times"],
        condition: Condition,
        arrangement: Arrangement,
    ) -> Float[Tensor, "b n out"]:
        """Patches in, patches out."""
        coordinates = arrangement.coordinates
        x = self.x_in(x)  # b n d
        x = x + sinusoidal_3d(coordinates, self.width).to(x.dtype)
        context = BlockContext(
            arrangement,
            self._signal(Times.of(t, arrangement), condition),
            rotary_angles(coordinates, self.head_width),
            self.text_in(condition.tokens),
            condition.mask,
        )
        for block in self.blocks:
            x = block(x, context)
        return self.final(x, context.signal)

    def _signal(self, times: Times, condition: Condition) -> Signal:
        pooled = self.pooled_in(condition.pooled)
        if times.clip is not None:
            pooled = pooled[times.clip]
        embedding = self.time(times.t) + pooled  # r d
        return Signal(embedding, times.row_of_token, F.silu(embedding))
