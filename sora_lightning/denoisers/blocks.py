"""The DiT blocks (arXiv 2212.09748, section 3.2) for any attention layout, with text: adaptive
layer norm with or without gates, in-context conditioning, cross-attention conditioning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.conditioning_embedding import BlockContext, ConditioningEmbedding
from sora_lightning.denoisers.modulation import AdaLN, Modulation, zero_init
from sora_lightning.layers.attention import CrossAttention, NormFactory, SelfAttention
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import JOINT, BlockPartitions, HeadSplit, TokenPartition
from sora_lightning.layers.positions.absolute import sinusoidal
from sora_lightning.layers.transformer import FeedForward, LayerNorm, RMSNorm

FeedForwardFactory = Callable[[int, int], nn.Module]
ModulationFactory = Callable[[int, int], Modulation]
SelfAttentionFactory = Callable[
    [int, int, TokenPartition | HeadSplit, NormFactory | None, bool], SelfAttention
]
TextAttentionFactory = Callable[[int, int, NormFactory | None, bool], CrossAttention]


@dataclass(frozen=True)
class AttentionKinds:
    """The classes of a block's attentions: W.A.L.T's are ``RelativeSelfAttention`` and
    ``JointTextAttention``.
    """

    among_tokens: SelfAttentionFactory = SelfAttention
    to_text: TextAttentionFactory = CrossAttention


@dataclass(frozen=True)
class BlockShape:
    """What a network decides about one of its blocks; a block's other arguments are its own."""

    width: int
    num_heads: int
    mlp_ratio: float
    partitions: BlockPartitions
    attends_to_text: bool

    @property
    def hidden_width(self) -> int:
        return int(self.width * self.mlp_ratio)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b m d"], scale: Float[Tensor, "b m d"]
) -> Float[Tensor, "b n d"]:
    """``x (1 + scale) + shift``, one pair for each clip (m = 1) or for each token (m = n)."""
    return torch.addcmul(shift, x, 1 + scale)


@dataclass(frozen=True)
class Sublayer:
    """How a sublayer's input is modulated and its output gated; ``None`` leaves either as it is."""

    shift: Float[Tensor, "b m d"] | None = None
    scale: Float[Tensor, "b m d"] | None = None
    gate: Float[Tensor, "b m d"] | None = None

    def enter(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Normed tokens as the sublayer takes them."""
        if self.shift is None or self.scale is None:
            return x
        return modulate(x, self.shift, self.scale)

    def join(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The sublayer's output ``y`` added to the tokens."""
        return x + y if self.gate is None else torch.addcmul(x, self.gate, y)


class Block(nn.Module, ABC):
    """A pre-norm transformer block over tokens in any sequence: one self-attention for each
    partition, cross-attention to whatever text there is, feed-forward.

    ``text_norm`` stands before the cross-attention, null for none.
    """

    def __init__(
        self,
        shape: BlockShape,
        norm: NormFactory,
        text_norm: NormFactory | None,
        qk_norm: NormFactory | None,
        feed_forward: FeedForwardFactory,
        bias: bool,
        kinds: AttentionKinds,
    ):
        super().__init__()
        self.width = width = shape.width
        self.attentions = nn.ModuleList(
            kinds.among_tokens(width, shape.num_heads, partition, qk_norm, bias)
            for partition in shape.partitions
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(len(self.attentions) + 1))
        self.text = None
        if shape.attends_to_text:
            self.text = kinds.to_text(width, shape.num_heads, qk_norm, bias)
            self.text_norm = nn.Identity() if text_norm is None else text_norm(width)
        self.mlp = feed_forward(width, shape.hidden_width)

    @property
    def shared_width(self) -> int:
        """The width of the modulation that all blocks share; 0 where each has its own."""
        return 0

    @abstractmethod
    def zero_init(self) -> None:
        """Make whatever starts at zero give zero."""

    @abstractmethod
    def final_layer(self, out_width: int) -> FinalLayer:
        """The layer that follows the last block."""

    def join(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b m d"], BlockContext]:
        """What a network does once before blocks of this kind: put time and pooled condition among
        the tokens, say. Here nothing.
        """
        return x, context

    def sublayers(self, c: ConditioningEmbedding) -> list[Sublayer]:
        """One for each self-attention, and the feed-forward's; here none is modulated."""
        return [Sublayer()] * len(self.norms)

    def forward(self, x: Float[Tensor, "b n d"], context: BlockContext) -> Float[Tensor, "b n d"]:
        *inner, last = self.sublayers(context.c)
        for attention, norm, sublayer in zip(self.attentions, self.norms[:-1], inner, strict=True):
            y = attention(sublayer.enter(norm(x)), context.angles, context.sequence)
            x = sublayer.join(x, y)
        if self.text is not None:
            y = self.text_norm(x)
            x = x + self.text(y, context.text, context.mask, context.sequence)
        return last.join(x, self.mlp(last.enter(self.norms[-1](x))))


class AdaLNBlock(Block):
    """Shift, scale and gate come from the time and the pooled condition.

    ``gated`` is adaLN-Zero, whose new block is the identity; without gates it is the paper's adaLN.
    The cross-attention has no modulation and a zero-initialised projection, as in PixArt (arXiv
    2310.00426), which has no norm before it either.
    """

    def __init__(
        self,
        shape: BlockShape,
        gated: bool = True,
        modulation: ModulationFactory = AdaLN,
        norm: NormFactory = LayerNorm,
        text_norm: NormFactory | None = LayerNorm,
        qk_norm: NormFactory | None = RMSNorm,
        feed_forward: FeedForwardFactory = FeedForward,
        bias: bool = True,
        kinds: AttentionKinds | None = None,
    ):
        kinds = kinds or AttentionKinds()
        super().__init__(shape, norm, text_norm, qk_norm, feed_forward, bias, kinds)
        self.gated = gated
        self.num_parts = (3 if gated else 2) * len(self.norms)
        self.modulation = modulation(self.width, self.num_parts)

    @property
    def shared_width(self) -> int:
        return self.num_parts * self.width if self.modulation.is_shared else 0

    def zero_init(self) -> None:
        self.modulation.zero_init()
        if self.text is not None:
            zero_init(self.text.out)

    def final_layer(self, out_width: int) -> FinalLayer:
        return FinalLayer(self.width, out_width, self.modulation.for_final_layer(self.width, 2))

    def sublayers(self, c: ConditioningEmbedding) -> list[Sublayer]:
        rows = c.expand_to_tokens(self.modulation(c))
        parts = rows.chunk(self.num_parts, dim=-1)
        step = self.num_parts // len(self.norms)
        return [Sublayer(*parts[i : i + step]) for i in range(0, self.num_parts, step)]


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
        super().__init__(shape, norm, norm, qk_norm, feed_forward, bias, AttentionKinds())
        self.norm = norm

    def zero_init(self) -> None:
        """Nothing: the paper's variants without adaptive norm start as any transformer does."""

    def final_layer(self, out_width: int) -> FinalLayer:
        return FinalLayer(self.width, out_width, None, self.norm)


class InContextBlock(PlainBlock):
    """Time and pooled condition are tokens of the clip, which see and are seen by all of it; so the
    layout must be joint.
    """

    def __init__(
        self,
        shape: BlockShape,
        norm: NormFactory = nn.LayerNorm,
        qk_norm: NormFactory | None = RMSNorm,
        feed_forward: FeedForwardFactory = FeedForward,
        bias: bool = True,
    ):
        if shape.partitions != (JOINT,):
            raise ValueError(
                "layout: in-context blocks place the condition's tokens among a clip's own, which "
                "asks for joint attention in every block"
            )
        super().__init__(shape, norm, qk_norm, feed_forward, bias)

    def join(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b m d"], BlockContext]:
        tokens = context.c.tokens(context.sequence.num_clips(x))
        before = context.sequence
        sequence = PackedSequence(before.grids, before.device, tokens.shape[1], before.kept)
        return sequence.insert_context(x, tokens), replace(context, sequence=sequence)


class CrossAttentionBlock(PlainBlock):
    """Time and pooled condition are tokens that stand before the text, to be attended to."""

    def __init__(
        self,
        shape: BlockShape,
        norm: NormFactory = nn.LayerNorm,
        qk_norm: NormFactory | None = RMSNorm,
        feed_forward: FeedForwardFactory = FeedForward,
        bias: bool = True,
    ):
        super().__init__(replace(shape, attends_to_text=True), norm, qk_norm, feed_forward, bias)

    def join(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b n d"], BlockContext]:
        text = context.c.tokens(context.sequence.num_clips(x))
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if context.text is not None and context.mask is not None:
            text = torch.cat([text, context.text], dim=1)
            mask = torch.cat([mask, context.mask], dim=1)
        return x, replace(context, text=text, mask=mask)


class TimeEmbedding(nn.Module):
    """Sinusoids of diffusion time through a two-layer perceptron. ``t`` is scaled by 1000, as DiT
    counts steps, or by another ``scale``.
    """

    def __init__(self, width: int, num_frequencies: int = 256, scale: float = 1000.0):
        super().__init__()
        self.scale = scale
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(num_frequencies, width)
        self.out = nn.Linear(width, width)
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=0.02)  # DiT initialises both so

    def forward(self, t: Float[Tensor, "*r"]) -> Float[Tensor, "*r d"]:
        return self.out(F.silu(self.hidden(sinusoidal(self.scale * t, self.num_frequencies))))


class FinalLayer(nn.Module):
    """Norm, modulated where the blocks are, and the projection to patch values, zero-initialised
    (DiT).
    """

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
        """Make the first prediction zero everywhere."""
        zero_init(self.out)
        if self.modulation is not None:
            self.modulation.zero_init()

    def forward(
        self, x: Float[Tensor, "b n d"], c: ConditioningEmbedding
    ) -> Float[Tensor, "b n p"]:
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = c.expand_to_tokens(self.modulation(c)).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return self.out(x)
