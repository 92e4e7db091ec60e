"""DiT blocks with adaLN-Zero (arXiv 2212.09748, section 3.2), for any attention layout and text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.conditioning_embedding import BlockContext, ConditioningEmbedding
from sora_lightning.denoisers.modulation import AdaLN, Modulation, zero_init
from sora_lightning.layers.attention import CrossAttention, NormFactory, SelfAttention
from sora_lightning.layers.partitions import BlockPartitions, HeadSplit, TokenPartition
from sora_lightning.layers.positions.absolute import sinusoidal
from sora_lightning.layers.transformer import FeedForward, LayerNorm, RMSNorm, TransformerSize

FeedForwardFactory = Callable[[int, int], nn.Module]
ModulationFactory = Callable[[int, int], Modulation]
SelfAttentionFactory = Callable[
    [int, int, TokenPartition | HeadSplit, NormFactory | None, bool], SelfAttention
]
CrossAttentionFactory = Callable[[int, int, NormFactory | None, bool], CrossAttention]


@dataclass(frozen=True)
class BlockShape:
    """Arguments of a block that the network derives from its size and layout."""

    width: int
    num_heads: int
    hidden_width: int
    partitions: BlockPartitions
    attends_to_text: bool

    @classmethod
    def of(
        cls, size: TransformerSize, partitions: BlockPartitions, attends_to_text: bool
    ) -> BlockShape:
        return cls(size.width, size.num_heads, size.hidden_width, partitions, attends_to_text)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b m d"], scale: Float[Tensor, "b m d"]
) -> Float[Tensor, "b n d"]:
    """Return ``x (1 + scale) + shift``, one pair for each clip (m = 1) or each token (m = n)."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module, ABC):
    """A pre-norm transformer block: one self-attention for each partition, cross-attention to the
    text, feed-forward.
    """

    def __init__(
        self,
        shape: BlockShape,
        norm: NormFactory,
        text_norm: NormFactory | None,
        qk_norm: NormFactory | None,
        feed_forward: FeedForwardFactory,
        bias: bool,
        self_attention: SelfAttentionFactory = SelfAttention,
        cross_attention: CrossAttentionFactory = CrossAttention,
    ):
        super().__init__()
        self.width = width = shape.width
        self.attentions = nn.ModuleList(
            self_attention(width, shape.num_heads, partition, qk_norm, bias)
            for partition in shape.partitions
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(len(self.attentions) + 1))
        self.text = None
        if shape.attends_to_text:
            self.text = cross_attention(width, shape.num_heads, qk_norm, bias)
            self.text_norm = nn.Identity() if text_norm is None else text_norm(width)
        self.mlp = feed_forward(width, shape.hidden_width)

    @property
    def shared_width(self) -> int:
        """Width of the modulation that all blocks share; 0 if each has its own."""
        return 0

    @abstractmethod
    def zero_init(self) -> None:
        """Zero the layers that start at zero."""

    @abstractmethod
    def final_layer(self, out_width: int) -> FinalLayer:
        """Return the layer that follows the last block."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> Float[Tensor, "b n d"]: ...

    def attend_to_text(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> Float[Tensor, "b n d"]:
        """Add the cross-attention to the text, if this block has one."""
        if self.text is None:
            return x
        y = self.text_norm(x)
        return x + self.text(y, context.text, context.mask, context.sequence)


class AdaLNBlock(Block):
    """The adaLN-Zero block: shift, scale and gate of each sublayer come from ``c``.

    A new block is the identity. The cross-attention is not modulated and its projection starts at
    zero, as in PixArt (arXiv 2310.00426), which has no ``text_norm`` either. W.A.L.T's attentions
    are ``RelativeSelfAttention`` and ``JointTextAttention``.
    """

    num_parts: ClassVar[int] = 3  # shift, scale, gate

    def __init__(
        self,
        shape: BlockShape,
        modulation: ModulationFactory = AdaLN,
        norm: NormFactory = LayerNorm,
        text_norm: NormFactory | None = LayerNorm,
        qk_norm: NormFactory | None = RMSNorm,
        feed_forward: FeedForwardFactory = FeedForward,
        bias: bool = True,
        self_attention: SelfAttentionFactory = SelfAttention,
        cross_attention: CrossAttentionFactory = CrossAttention,
    ):
        super().__init__(
            shape, norm, text_norm, qk_norm, feed_forward, bias, self_attention, cross_attention
        )
        self.modulation = modulation(self.width, self.num_parts * len(self.norms))

    def forward(self, x: Float[Tensor, "b n d"], context: BlockContext) -> Float[Tensor, "b n d"]:
        *msa, mlp = self.modulate_sublayers(context.c)  # three of b m d for each sublayer
        for attention, norm, (shift, scale, gate) in zip(
            self.attentions, self.norms[:-1], msa, strict=True
        ):
            y = attention(modulate(norm(x), shift, scale), context.angles, context.sequence)
            x = torch.addcmul(x, gate, y)  # b n d: x + gate * y
        x = self.attend_to_text(x, context)  # b n d
        shift, scale, gate = mlp
        y = self.mlp(modulate(self.norms[-1](x), shift, scale))
        return torch.addcmul(x, gate, y)  # b n d: x + gate * y

    def modulate_sublayers(self, c: ConditioningEmbedding) -> list[tuple[Tensor, ...]]:
        """Return shift, scale and gate (``b m d``) of each attention and of the feed-forward."""
        rows = c.expand_to_tokens(self.modulation(c))  # b m (sublayers parts d)
        parts = rows.chunk(self.num_parts * len(self.norms), dim=-1)
        return list(zip(*[iter(parts)] * self.num_parts, strict=True))

    @property
    def shared_width(self) -> int:
        if not self.modulation.is_shared:
            return 0
        return self.num_parts * len(self.norms) * self.width

    def zero_init(self) -> None:
        self.modulation.zero_init()
        if self.text is not None:
            zero_init(self.text.out)

    def final_layer(self, out_width: int) -> FinalLayer:
        return FinalLayer(self.width, out_width, self.modulation.for_final_layer(self.width, 2))


BlockFactory = Callable[[BlockShape], Block]


class TimeEmbedding(nn.Module):
    """Sinusoids of the step ``scale * t + offset``, at least 0, through a two-layer perceptron.

    ``scale`` is the number of steps from data to noise: DiT's is 1000, SiT's 1. The public DiT
    counts its steps from 0, so that step n is t = (n + 1) / 1000: ``offset`` is -1 there. The
    initial weights' standard deviation is DiT's 0.02; with ``base_width`` that of the second layer
    is 0.02 at this width and falls as 1 / sqrt(width) (muP, arXiv 2203.03466).
    """

    def __init__(
        self,
        width: int,
        num_frequencies: int = 256,
        scale: float = 1000.0,
        offset: float = 0.0,
        base_width: int | None = None,
    ):
        super().__init__()
        self.scale, self.offset = scale, offset
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(num_frequencies, width)
        self.out = nn.Linear(width, width)
        self.base_width = base_width
        nn.init.normal_(self.hidden.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02 * ((base_width or width) / width) ** 0.5)

    def forward(self, t: Float[Tensor, "*r"]) -> Float[Tensor, "*r d"]:
        step = self.scale * t.to(torch.promote_types(t.dtype, torch.float32)) + self.offset
        waves = sinusoidal(step.clamp(min=0), self.num_frequencies)  # *r num_frequencies
        return self.out(F.silu(self.hidden(waves.to(self.hidden.weight.dtype))))


class FinalLayer(nn.Module):
    """Norm, modulated if the blocks are, and a zero-initialised projection to patches (DiT)."""

    def __init__(
        self,
        width: int,
        out_width: int,
        modulation: Modulation | None,
        norm: NormFactory = LayerNorm,
    ):
        super().__init__()
        self.norm = norm(width)
        self.modulation = modulation
        self.out = nn.Linear(width, out_width)

    def zero_init(self) -> None:
        """Make a new network predict zero."""
        zero_init(self.out)
        if self.modulation is not None:
            self.modulation.zero_init()

    def forward(
        self, x: Float[Tensor, "b n d"], c: ConditioningEmbedding
    ) -> Float[Tensor, "b n p"]:
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = c.expand_to_tokens(self.modulation(c)).chunk(2, dim=-1)  # b m d
            x = modulate(x, shift, scale)
        return self.out(x)
