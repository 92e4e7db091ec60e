"""Multi-head attention: among the tokens of a partition's groups, and from video tokens to text
tokens.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_lightning.layers.partitions import Partition
from sora_lightning.layers.position import rotate
from sora_lightning.types import TokenGrid


class SelfAttention(nn.Module):
    """Attention within the groups of one partition, with normalised queries and keys and rotary
    positions.

    Query-key norm keeps logits bounded (arXiv 2302.05442, section 2.2).
    """

    def __init__(self, width: int, num_heads: int, partition: Partition):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.partition = partition
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b n d"], angles: Float[Tensor, "n a"], grid: TokenGrid
    ) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(
            self.qkv(x), "b n (three k d) -> three b k n d", three=3, k=self.num_heads
        )
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        q, k, v = (self._group(y, grid) for y in (q, k, v))  # (b g) k m d
        y = F.scaled_dot_product_attention(q, k, v)
        y = rearrange(y, "g k m d -> g m (k d)")
        return self.out(self.partition.ungroup(y, grid))  # b n d

    def _group(self, x: Float[Tensor, "b k n d"], grid: TokenGrid) -> Float[Tensor, "g k m d"]:
        tokens = self.partition.group(rearrange(x, "b k n d -> b n (k d)"), grid)
        return rearrange(tokens, "g m (k d) -> g k m d", k=self.num_heads)


class CrossAttention(nn.Module):
    """Attention from video tokens to the text tokens of their clip."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b n d"]:
        q = rearrange(self.q(x), "b n (k d) -> b k n d", k=self.num_heads)
        k, v = rearrange(self.kv(text), "b l (two k d) -> two b k l d", two=2, k=self.num_heads)
        y = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=mask[:, None, None, :]
        )
        return self.out(rearrange(y, "b k n d -> b n (k d)"))
