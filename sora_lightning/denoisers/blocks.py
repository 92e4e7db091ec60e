"""The DiT block with adaLN-Zero (arXiv 2212.09748, section 3.2), for any attention layout, with
text.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.signal import BlockContext, Signal
from sora_lightning.layers.attention import CrossAttention, SelfAttention
from sora_lightning.layers.partitions import BlockPartitions
from sora_lightning.layers.position import sinusoidal
from sora_lightning.layers.transformer import FeedForward


def zero_init(linear: nn.Linear) -> None:
    """Make a projection give zero until it has been trained."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b m d"], scale: Float[Tensor, "b m d"]
) -> Float[Tensor, "b n d"]:
    """``x (1 + scale) + shift``, one pair for each clip (m = 1) or for each token (m = n)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """One self-attention for each partition, cross-attention to the text, feed-forward: each gated
    from zero.

    Shift, scale and gate come from the time and the pooled condition (adaLN-Zero); the
    cross-attention has no modulation and a zero-initialised projection, as in PixArt (arXiv
    2310.00426). A new block is the identity.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, partitions: BlockPartitions):
        super().__init__()
        self.attentions = nn.ModuleList(SelfAttention(width, num_heads, p) for p in partitions)
        self.text = CrossAttention(width, num_heads)
        self.mlp = FeedForward(width, int(width * mlp_ratio))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        num_gated = len(self.attentions) + 1
        self.modulation = nn.Linear(width, 3 * num_gated * width)

    def zero_init(self) -> None:
        """Make the block the identity: zero gates, zero text projection."""
        zero_init(self.modulation)
        zero_init(self.text.out)

    def forward(self, x: Float[Tensor, "b n d"], context: BlockContext) -> Float[Tensor, "b n d"]:
        parts = rearrange(
            context.signal.spread(self.modulation(context.signal.activated)),
            "b m (part three d) -> part three b m d",
            three=3,
            d=x.shape[-1],
        )
        for attention, (shift, scale, gate) in zip(self.attentions, parts[:-1], strict=True):
            y = modulate(self.norm(x), shift, scale)
            x = x + gate * attention(y, context.angles, context.arrangement)
        x = x + self.text(self.norm(x), context.text, context.mask, context.arrangement)
        shift, scale, gate = parts[-1]
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class TimeEmbedding(nn.Module):
    """Sinusoids of diffusion time through a two-layer perceptron. ``t`` is scaled by 1000, as DiT
    counts steps.
    """

    def __init__(self, width: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.hidden = nn.Linear(num_frequencies, width)
        self.out = nn.Linear(width, width)
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=0.02)  # DiT initialises both so

    def forward(self, t: Float[Tensor, "*r"]) -> Float[Tensor, "*r d"]:
        return self.out(F.silu(self.hidden(sinusoidal(1000 * t, self.num_frequencies))))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patch values, both zero-initialised (DiT)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_width)

    def zero_init(self) -> None:
        """Make the first prediction zero everywhere."""
        zero_init(self.modulation)
        zero_init(self.out)

    def forward(self, x: Float[Tensor, "b n d"], signal: Signal) -> Float[Tensor, "b n p"]:
        shift, scale = signal.spread(self.modulation(signal.activated)).chunk(2, dim=-1)
        return self.out(modulate(self.norm(x), shift, scale))
