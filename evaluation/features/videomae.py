"""The video transformer of content-debiased FVD: VideoMAE v2, ViT-g.

It is fine-tuned on Something-Something v2. Its features depend on motion more than I3D's (Ge et
al., 2024; Wang et al., 2023). Submodules are named as in the public weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.extractor import RANDOM, Extractor, drawn, fill
from evaluation.features.resize import Filter, to_square
from evaluation.features.weights import locate_weights


@dataclass(frozen=True)
class ViTSize:
    """Sizes of the network; the defaults are ViT-g's. Tubelets are 2 frames deep."""

    side: int = 224
    num_frames: int = 16
    patch: int = 14
    width: int = 1408
    depth: int = 40
    num_heads: int = 16
    hidden: int = 6144
    num_classes: int = 174

    def __post_init__(self) -> None:
        if self.side % self.patch or self.num_frames % 2 or self.width % self.num_heads:
            raise ValueError(f"{self}: patch must divide side, 2 num_frames, and num_heads width")


class VideoMAE(Extractor):
    """Normalised mean of the tokens of exactly 16 frames at 224 x 224 in [0, 1].

    Args:
        weights: ``random``, a path, a URL, or ``env:NAME``.
        digest: Expected hash of the file.
        published: Whether that digest is the public file's, to be set by the protocol's author.
        size: ViT-g's by default, with a billion weights; other sizes change the name of scores.
    """

    kind = "videomae"

    def __init__(
        self,
        weights: str,
        digest: str = "",
        published: bool = False,
        size: ViTSize | None = None,
        filter: Filter = "bilinear",
    ) -> None:
        super().__init__()
        self.size = size or ViTSize()
        self.filter = filter
        if weights != RANDOM:
            locate_weights(weights, digest)  # before memory for a billion weights is allocated
        self.feature_dim = self.size.width
        self.least_frames = self.size.num_frames
        self.network = drawn(lambda: VideoTransformer(self.size))
        known = (digest,) if published and digest and self.size == ViTSize() else ()
        self.standing = fill(self.network, weights, digest, known)
        self.settings = {**asdict(self.size), "filter": filter, "fit": "squash"}
        self.freeze()

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raise ``ValueError`` for clips of another length than in the training."""
        if num_frames != self.size.num_frames:
            raise ValueError(f"clips of {num_frames} frames: VideoMAE takes {self.size.num_frames}")

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        self.check(videos)
        return self.network(to_square(videos, self.size.side, self.filter, "squash") / 255)


class VideoTransformer(nn.Module):
    """Tubelets, fixed sine and cosine positions, pre-norm blocks, normalised mean of the tokens.

    The classification head exists so that public files load completely; features do not use it.
    """

    positions: Tensor

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        tubelet = (2, size.patch, size.patch)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, size.width, tubelet, stride=tubelet)}
        )
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.fc_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.num_classes)
        num_tokens = size.num_frames // 2 * (size.side // size.patch) ** 2
        self.register_buffer("positions", sines(num_tokens, size.width), persistent=False)

    def forward(self, x: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        x = rearrange(self.patch_embed["proj"](x), "b d f h w -> b (f h w) d") + self.positions
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))


class _Block(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, eps=1e-6) for _ in range(2))
        self.attn = _Attention(size.width, size.num_heads)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(size.width, size.hidden), "fc2": nn.Linear(size.hidden, size.width)}
        )

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Attention(nn.Module):
    """Self-attention with biases for queries and values, but not for keys."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three k d) -> three b k n d", three=3, k=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b k n d -> b n (k d)"))


def sines(num_tokens: int, width: int) -> Float[Tensor, "n d"]:
    """Alternating sine and cosine of n / 10000^(2i / d), over the tokens as one sequence."""
    frequencies = torch.exp(-math.log(10000.0) / width * torch.arange(0, width, 2).double())
    angles = torch.outer(torch.arange(num_tokens).double(), frequencies)
    both = torch.stack([angles.sin(), angles.cos()], dim=-1)
    return rearrange(both, "n i two -> n (i two)")[:, :width].float()
