"""The size of a transformer, norms, feed-forward layers, and a plain pre-norm block (arXiv
1706.03762, 2002.04745).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


def head_width(width: int, num_heads: int) -> int:
    """Return the channels of a head. Raises ``ValueError`` where the width is no multiple."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads = {num_heads}: must divide width = {width}")
    return width // num_heads


@dataclass(frozen=True)
class TransformerSize:
    """Depth in blocks, width in channels, number of heads, and hidden width of a feed-forward layer
    as a multiple of the width.
    """

    depth: int
    width: int
    num_heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        head_width(self.width, self.num_heads)

    @property
    def head_width(self) -> int:
        return head_width(self.width, self.num_heads)

    @property
    def hidden_width(self) -> int:
        return int(self.width * self.mlp_ratio)


class LayerNorm(nn.LayerNorm):
    """Layer norm without learned scale and shift unless ``affine``; DiT modulates its output."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = False):
        super().__init__(width, eps=eps, elementwise_affine=affine)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv 1910.07467); ``scale`` is learned."""

    def __init__(self, width: int, eps: float = 1e-6, scale: bool = True):
        super().__init__(width, eps=eps, elementwise_affine=scale)


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh form, as DiT), linear."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__(
            nn.Linear(width, hidden_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden_width, width),
        )


class SwiGLU(nn.Module):
    """``out(silu(gate(x)) * up(x))`` (arXiv 2002.05202).

    It has 2/3 of the hidden width, hence as many parameters as ``FeedForward``.
    """

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        inner = 2 * hidden_width // 3
        self.gate_up = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over a masked sequence, then feed-forward."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        head_width(width, num_heads)
        self.num_heads = num_heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, int(width * mlp_ratio))

    def forward(
        self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b l d"]:
        q, k, v = rearrange(
            self.qkv(self.norm_1(x)),
            "b l (three k d) -> three b k l d",
            three=3,
            k=self.num_heads,
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(rearrange(y, "b k l d -> b l (k d)"))
        return x + self.mlp(self.norm_2(x))
