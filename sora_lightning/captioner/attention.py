"""Multi-head attention whose keys and values may have been computed before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_lightning.layers.transformer import FeedForward, LayerNorm, RMSNorm, TransformerSize

KeysValues = tuple[Float[Tensor, "b k l e"], Float[Tensor, "b k l e"]]


class Attention(nn.Module):
    """Attention from ``x`` to a context of another width, with normalised queries and keys (arXiv
    2302.05442, section 2.2).
    """

    def __init__(self, width: int, num_heads: int, context_width: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width or width, 2 * width)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.out = nn.Linear(width, width)

    def keys_values(self, context: Float[Tensor, "b l c"]) -> KeysValues:
        k, v = (
            rearrange(half, "b l (k e) -> b k l e", k=self.num_heads)
            for half in self.kv(context).chunk(2, dim=-1)
        )
        return self.k_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        keys_values: KeysValues,
        mask: Bool[Tensor, "*b m l"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """``mask`` is True where a query sees a key; ``None`` hides nothing."""
        q = self.q_norm(rearrange(self.q(x), "b m (k e) -> b k m e", k=self.num_heads))
        y = F.scaled_dot_product_attention(q, *keys_values, attn_mask=mask)
        return self.out(rearrange(y, "b k m e -> b m (k e)"))


class TextBlock(nn.Module):
    """Pre-norm self-attention over text, attention to a video where ``sees_video``, and
    feed-forward.
    """

    def __init__(self, size: TransformerSize, sees_video: bool):
        super().__init__()
        width = size.width
        self.norm = LayerNorm(width, affine=True)
        self.attention = Attention(width, size.num_heads)
        self.video_norm = LayerNorm(width, affine=True) if sees_video else None
        self.video_attention = Attention(width, size.num_heads) if sees_video else None
        self.mlp_norm = LayerNorm(width, affine=True)
        self.mlp = FeedForward(width, size.hidden_width)

    def video_keys_values(self, context: Float[Tensor, "b l d"]) -> KeysValues:
        assert self.video_attention is not None
        return self.video_attention.keys_values(context)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "*b m l"] | None,
        video: KeysValues | None = None,
        video_mask: Bool[Tensor, "*b m l"] | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Float[Tensor, "b m d"], KeysValues]:
        """Return the new tokens' outputs, and keys and values of all tokens, ``past`` ones too."""
        y = self.norm(x)
        now = self.attention.keys_values(y)
        if past is not None:
            now = (torch.cat([past[0], now[0]], dim=2), torch.cat([past[1], now[1]], dim=2))
        x = x + self.attention(y, now, mask)
        if self.video_attention is not None:
            assert self.video_norm is not None
            assert video is not None
            x = x + self.video_attention(self.video_norm(x), video, video_mask)
        return x + self.mlp(self.mlp_norm(x)), now
