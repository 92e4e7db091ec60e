"""The DiT paper's other ways to condition a block (arXiv 2212.09748, section 3.2): adaLN without
gates, in-context tokens, and cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.blocks import (
    AdaLNBlock,
    Block,
    BlockFactory,
    BlockShape,
    FeedForwardFactory,
    FinalLayer,
    modulate,
)
from sora_lightning.denoisers.conditioning_embedding import BlockContext
from sora_lightning.denoisers.dit import DiT
from sora_lightning.layers.attention import NormFactory
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import JOINT
from sora_lightning.layers.transformer import FeedForward, RMSNorm


class UngatedAdaLNBlock(AdaLNBlock):
    """The adaLN block: shift and scale of each sublayer come from ``c``, without gates."""

    num_parts: ClassVar[int] = 2

    def forward(self, x: Float[Tensor, "b n d"], context: BlockContext) -> Float[Tensor, "b n d"]:
        *msa, mlp = self.modulate_sublayers(context.c)  # two of b m d for each sublayer
        for attention, norm, shift_scale in zip(self.attentions, self.norms[:-1], msa, strict=True):
            x = x + attention(modulate(norm(x), *shift_scale), context.angles, context.sequence)
        x = self.attend_to_text(x, context)
        return x + self.mlp(modulate(self.norms[-1](x), *mlp))


class PlainBlock(Block):
    """A block without modulation."""

    def __init__(
        self,
        shape: BlockShape,
        norm: NormFactory = nn.LayerNorm,
        qk_norm: NormFactory | None = RMSNorm,
        feed_forward: FeedForwardFactory = FeedForward,
        bias: bool = True,
    ):
        super().__init__(shape, norm, norm, qk_norm, feed_forward, bias)
        self.norm = norm

    def forward(self, x: Float[Tensor, "b n d"], context: BlockContext) -> Float[Tensor, "b n d"]:
        for attention, norm in zip(self.attentions, self.norms[:-1], strict=True):
            x = x + attention(norm(x), context.angles, context.sequence)
        x = self.attend_to_text(x, context)
        return x + self.mlp(self.norms[-1](x))

    def zero_init(self) -> None:
        """Do nothing: the paper's variants without adaptive norm start as any transformer does."""

    def final_layer(self, out_width: int) -> FinalLayer:
        return FinalLayer(self.width, out_width, None, self.norm)


class InContextDiT(DiT):
    """A ``DiT`` in which time and pooled condition are tokens of the clip, one time for each clip.

    They see all tokens of the clip and are seen by them, so the layout must be joint.
    """

    block: ClassVar[BlockFactory] = PlainBlock

    def make_blocks(self, make: BlockFactory, shapes: Sequence[BlockShape]) -> list[Block]:
        if any(shape.partitions != (JOINT,) for shape in shapes):
            raise ValueError(
                "layout: in-context blocks place the condition's tokens among a clip's own, which "
                "asks for joint attention in every block"
            )
        self.positions.check(last_block=0)
        return super().make_blocks(make, shapes)

    def with_condition_tokens(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b m d"], BlockContext]:
        before = context.sequence
        tokens = context.c.tokens(before.num_clips(x))  # clips 2 d: time, pooled
        sequence = PackedSequence(before.grids, before.device, tokens.shape[1], before.kept)
        x = sequence.insert_context(x, tokens)
        return x, replace(context, sequence=sequence, angles=self.angles(sequence))


class CrossAttentionDiT(DiT):
    """A ``DiT`` in which every block attends to time and pooled condition, one time for each clip.

    They precede the text.
    """

    block: ClassVar[BlockFactory] = PlainBlock

    def attends_to_text(self, block: int) -> bool:
        return True

    def with_condition_tokens(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b n d"], BlockContext]:
        text = context.c.tokens(context.sequence.num_clips(x))  # clips 2 d: time, pooled
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if context.text is not None and context.mask is not None:
            text = torch.cat([text, context.text], dim=1)
            mask = torch.cat([mask, context.mask], dim=1)
        return x, replace(context, text=text, mask=mask)
