"""ViViT (arXiv 2103.15691): a video encoder in four attention layouts.

Models 1, 3 and 4 are ``ViViT`` with the layouts ``Joint``, ``FactorisedSelfAttention`` and
``FactorisedDotProduct``. Model 2, whose second half takes one vector for each frame, is
``FactorisedViViT``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.checks import require_at_least
from sora_lightning.layers.attention import NormFactory, SelfAttention
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import AttentionLayout, BlockPartitions, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import LearnedPositions
from sora_lightning.layers.transformer import FeedForward, LayerNorm, TransformerSize
from sora_lightning.types import TokenGrid

VIT_SIZES = {
    "tiny": TransformerSize(4, 64, 2),
    "S": TransformerSize(12, 384, 6),
    "B": TransformerSize(12, 768, 12),
    "L": TransformerSize(24, 1024, 16),
}


@dataclass(frozen=True)
class Tubelets:
    """Number of pixels of a token, and the grid of tokens that have learned positions.

    The defaults are the paper's 16x2 on 32 frames of 224 x 224.
    """

    frames: int = 2
    rows: int = 16
    columns: int = 16
    grid: TokenGrid = field(default_factory=lambda: TokenGrid(16, 14, 14))

    @property
    def patch(self) -> Patch:
        return Patch(self.frames, self.rows, self.columns)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a video, frame-major, and its pooled vector.

    ``grid`` is that of the tokens: for ``FactorisedViViT`` one token for each frame.
    """

    tokens: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b d"]
    grid: TokenGrid


class EncoderBlock(nn.Module):
    """A pre-norm block: one attention for each partition, then feed-forward.

    The paper has no ``qk_norm``; see ``SelfAttention``.
    """

    def __init__(
        self,
        size: TransformerSize,
        partitions: BlockPartitions,
        qk_norm: NormFactory | None = None,
    ):
        super().__init__()
        width = size.width
        self.attentions = nn.ModuleList(
            SelfAttention(width, size.num_heads, partition, qk_norm) for partition in partitions
        )
        self.norms = nn.ModuleList(LayerNorm(width, affine=True) for _ in partitions)
        self.mlp_norm = LayerNorm(width, affine=True)
        self.mlp = FeedForward(width, size.hidden_width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        sequence: PackedSequence,
        angles: Float[Tensor, "n a"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """``angles`` are rotary positions; ``None`` is no rotation."""
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), angles, sequence)
        return x + self.mlp(self.mlp_norm(x))


class ViViT(nn.Module):
    """One stack of blocks over the tokens of all frames, in any layout.

    ``class_token`` adds a token whose output is the pooled vector, as in model 1; it needs joint
    attention. Without it the pooled vector is the tokens' mean.
    """

    def __init__(
        self,
        channels: int = 3,
        size: TransformerSize | None = None,
        tubelets: Tubelets | None = None,
        layout: AttentionLayout | None = None,
        class_token: bool = True,
    ):
        super().__init__()
        size, tubelets, layout = (
            size or VIT_SIZES["B"],
            tubelets or Tubelets(),
            layout or Joint(),
        )
        if class_token and not isinstance(layout, Joint):
            raise ValueError(f"class_token with {type(layout).__name__}: it needs joint attention")
        self.patch, self.width = tubelets.patch, size.width
        grid, width = tubelets.grid, size.width
        self.x_in = nn.Linear(channels * self.patch.volume, width)
        self.positions = LearnedPositions(grid.f, grid.h, grid.w, width)
        self.class_token = ClassToken(width) if class_token else None
        self.blocks = nn.ModuleList(
            EncoderBlock(size, partitions) for partitions in layout.schedule(size.depth)
        )
        self.norm = LayerNorm(width, affine=True)
        initialise(self)

    def forward(self, video: Float[Tensor, "b c F H W"]) -> Encoded:
        """Encode a video. Raises ``ValueError`` for a size that the tubelets do not divide."""
        grid = self.patch.grid(*video.shape[2:])
        x = self.x_in(self.patch.patchify(video)) + self.positions(grid)  # b n d
        num_context = 0 if self.class_token is None else 1
        if self.class_token is not None:
            x = self.class_token(x)
        sequence = PackedSequence([grid], video.device, num_context)
        for block in self.blocks:
            x = block(x, sequence)
        x = self.norm(x)
        pooled = reduce(x, "b n d -> b d", "mean") if num_context == 0 else x[:, 0]
        return Encoded(x[:, num_context:], pooled, grid)


class FactorisedViViT(nn.Module):
    """Model 2: blocks within each frame, then ``temporal_depth`` blocks over one vector for each
    frame.

    With a ``temporal_depth`` of 0 the pooled vector is the mean of the frames' vectors.
    """

    def __init__(
        self,
        channels: int = 3,
        size: TransformerSize | None = None,
        tubelets: Tubelets | None = None,
        temporal_depth: int = 4,
    ):
        super().__init__()
        require_at_least(0, temporal_depth=temporal_depth)
        size, tubelets = size or VIT_SIZES["B"], tubelets or Tubelets()
        self.patch, self.width = tubelets.patch, size.width
        grid, width, joint = tubelets.grid, size.width, Joint().partitions(0)
        self.x_in = nn.Linear(channels * self.patch.volume, width)
        self.positions = LearnedPositions(1, grid.h, grid.w, width)
        self.class_token = ClassToken(width)
        self.blocks, self.temporal_blocks = (
            nn.ModuleList(EncoderBlock(size, joint) for _ in range(depth))
            for depth in (size.depth, temporal_depth)
        )
        self.norm = LayerNorm(width, affine=True)
        self.frame_positions = LearnedPositions(grid.f, 1, 1, width) if temporal_depth else None
        self.video_token = ClassToken(width) if temporal_depth else None
        self.temporal_norm = LayerNorm(width, affine=True) if temporal_depth else None
        initialise(self)

    def forward(self, video: Float[Tensor, "b c F H W"]) -> Encoded:
        """Encode a video. Raises ``ValueError`` for a size that the tubelets do not divide."""
        grid = self.patch.grid(*video.shape[2:])
        x = rearrange(self.x_in(self.patch.patchify(video)), "b (f s) d -> (b f) s d", f=grid.f)
        frame = TokenGrid(1, grid.h, grid.w)
        x = self.class_token(x + self.positions(frame))
        for block in self.blocks:
            x = block(x, PackedSequence([frame], video.device, num_context=1))
        x = rearrange(self.norm(x)[:, 0], "(b f) d -> b f d", f=grid.f)
        times = TokenGrid(grid.f, 1, 1)
        if self.video_token is None:
            return Encoded(x, reduce(x, "b f d -> b d", "mean"), times)
        assert self.frame_positions is not None
        assert self.temporal_norm is not None
        x = self.video_token(x + self.frame_positions(times))
        for block in self.temporal_blocks:
            x = block(x, PackedSequence([times], video.device, num_context=1))
        x = self.temporal_norm(x)
        return Encoded(x[:, 1:], x[:, 0], times)


class ClassToken(nn.Module):
    """A learned token with its own position, before all others."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width))
        self.position = nn.Parameter(torch.empty(1, width))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        first = repeat(self.token + self.position, "one d -> b one d", b=len(x))
        return torch.cat([first.to(x.dtype), x], dim=1)


def initialise(model: nn.Module) -> None:
    """Initialise linear layers as the public code: Xavier-uniform, with zero bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
