"""U-ViT (arXiv 2209.12152) on video latents: time, condition and patches are tokens, and long skip
connections join the first half of the blocks to the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_lightning.checks import require_at_least
from sora_lightning.denoisers.base import Denoiser, clip_by_clip
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import LearnedPositions, sinusoidal
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, PackedLatents

# arXiv 2209.12152, Table 1; the depth counts the middle block too
UVIT_SIZES = {
    "tiny": TransformerSize(5, 64, 2),
    "S": TransformerSize(13, 512, 8),
    "S-deep": TransformerSize(17, 512, 8),
    "M": TransformerSize(17, 768, 12),
    "L": TransformerSize(21, 1024, 16),
    "H": TransformerSize(29, 1152, 16),
}


@dataclass(frozen=True)
class LearnedExtent:
    """Number of condition tokens, frames, rows and columns of tokens that have a learned position.

    Positions of other grids are interpolated (trilinear).
    """

    condition: int = 77
    frames: int = 1
    rows: int = 16
    columns: int = 16

    def __post_init__(self) -> None:
        require_at_least(0, where="extent.", condition=self.condition)


class UViTBlock(nn.Module):
    """Pre-norm attention over all tokens, and feed-forward.

    With ``skip`` it first merges the output of an earlier block by concatenation and a linear layer
    (the best variant of the paper's Figure 2a).
    """

    def __init__(self, size: TransformerSize, skip: bool):
        super().__init__()
        width, hidden = size.width, size.hidden_width
        self.num_heads = size.num_heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"],
        earlier: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        if self.skip is not None:
            assert earlier is not None
            x = self.skip(torch.cat([x, earlier], dim=-1))
        q, k, v = rearrange(
            self.qkv(self.norm_1(x)),
            "b n (three k d) -> three b k n d",
            three=3,
            k=self.num_heads,
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(rearrange(y, "b k n d -> b n (k d)"))
        return x + self.mlp(self.norm_2(x))


class UViT(Denoiser):
    """One plain transformer with long skips over condition tokens, a time token and patches.

    The pooled vector of the condition is not used. Turn ``project_condition`` off for condition
    tokens of the network's own width, such as labels. ``smooth`` ends with a convolution over rows
    and columns, which the paper's H models do not have. Without ``skips`` it is the plain
    transformer of the paper's Figure 2a. The time token embeds ``time_scale t``: 1000 for models
    that count steps, 999 for the reference's continuous models (CIFAR-10, ImageNet 64). A clip has
    one time.
    """

    def __init__(
        self,
        latent_channels: int,
        condition_width: int,
        size: TransformerSize | None = None,
        patch: Sequence[int] = (1, 2, 2),
        extent: LearnedExtent | None = None,
        project_condition: bool = True,
        smooth: bool = True,
        time_scale: float = 1000.0,
        skips: bool = True,
    ):
        super().__init__(Patch.of(patch))
        size, self.extent = size or UVIT_SIZES["S"], extent or LearnedExtent()
        width = size.width
        if size.depth % 2 == 0:
            raise ValueError(f"depth {size.depth} must be odd: as many blocks before the middle")
        if width % 2:
            raise ValueError(f"width {width} must be even")
        if not project_condition and condition_width != width:
            raise ValueError(
                f"project_condition is off: condition width {condition_width} must be {width}"
            )
        self.width, self.time_scale = width, time_scale
        values = latent_channels * self.patch.volume
        self.x_in = nn.Linear(values, width)
        self.condition_in = (
            nn.Linear(condition_width, width) if project_condition else nn.Identity()
        )
        e = self.extent
        self.condition_position = nn.Parameter(torch.empty(e.condition, width))
        self.time_position = nn.Parameter(torch.empty(1, width))
        self.positions = LearnedPositions(e.frames, e.rows, e.columns, width)
        self.down, self.middle, self.up = (
            nn.ModuleList(UViTBlock(size, skip) for _ in range(count))
            for count, skip in ((size.depth // 2, False), (1, False), (size.depth // 2, skips))
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, values)
        self.smooth = (
            nn.Conv3d(latent_channels, latent_channels, (1, 3, 3), padding=(0, 1, 1))
            if smooth
            else nn.Identity()
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for position in (self.condition_position, self.time_position):
            nn.init.trunc_normal_(position, std=0.02)

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"] | PackedLatents:
        if isinstance(x_t, PackedLatents):
            return clip_by_clip(self, x_t, t, condition)
        if t.numel() != len(t):
            raise ValueError(
                f"times of shape {tuple(t.shape)}: U-ViT has one time token, so one time a clip"
            )
        t = t.reshape(-1)
        grid = self.patch.grid(*x_t.shape[2:])
        first, mask = self._first_tokens(t, condition)  # b m d
        patches = self.patch.patchify(x_t).to(self.x_in.weight.dtype)  # b n p
        patches = self.x_in(patches) + self.positions(grid)  # b n d
        x = torch.cat([first.to(patches.dtype), patches], dim=1)  # b n d
        mask = F.pad(mask, (0, grid.num_tokens), value=True)
        skips = []
        for block in self.down:
            x = block(x, mask)
            skips.append(x)
        x = self.middle[0](x, mask)
        for block in self.up:
            x = block(x, mask, skips.pop())
        values = self.out(self.norm(x[:, first.shape[1] :]))
        return self.smooth(self.patch.unpatchify(values, grid))  # b c f h w

    def _first_tokens(
        self, t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]:
        """Return condition tokens and time with their positions, and a mask that is True for real
        ones.
        """
        steps = self.time_scale * t.to(torch.promote_types(t.dtype, torch.float32))
        time = rearrange(sinusoidal(steps, self.width), "b d -> b 1 d")
        time = time.to(self.time_position.dtype) + self.time_position
        if self.extent.condition == 0:
            return time, torch.ones_like(time[..., 0], dtype=torch.bool)
        length = condition.mask.shape[1]
        if length > self.extent.condition:
            raise ValueError(
                f"{length} condition tokens, and positions for {self.extent.condition}: raise "
                "extent.condition or shorten the texts"
            )
        tokens = self.condition_in(condition.tokens) + self.condition_position[:length]
        return torch.cat([tokens, time], dim=1), F.pad(condition.mask, (0, 1), value=True)
