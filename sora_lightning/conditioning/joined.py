"""Several text encoders together, as CLIP and T5 in Stable Diffusion 3 (arXiv 2403.03206) and
Open-Sora 2.0 (arXiv 2503.09642).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.types import Condition


@dataclass(frozen=True)
class TextPart:
    """An encoder, and which of its ``tokens`` and ``pooled`` vector are used: one of them at
    least.
    """

    encoder: Conditioner
    tokens: bool = True
    pooled: bool = True

    def __post_init__(self) -> None:
        if not (self.tokens or self.pooled):
            raise ValueError("tokens and pooled are both false: the encoder would not be used")


class JoinedText(Conditioner):
    """Projects each encoder to ``width``; tokens follow one another, pooled vectors are added.

    A sum of projections is one projection of the concatenated vectors. Raises ``ValueError`` unless
    one part at least gives tokens, and one a pooled vector.
    """

    def __init__(self, parts: list[TextPart], width: int):
        super().__init__(width)
        for name in ("tokens", "pooled"):
            if not any(getattr(part, name) for part in parts):
                raise ValueError(f"parts: {name} is false in all of them, and a condition needs it")
        self.parts = parts
        self.encoders = nn.ModuleList(part.encoder for part in parts)
        self.tokens_in = _projections([part.encoder for part in parts if part.tokens], width)
        self.pooled_in = _projections([part.encoder for part in parts if part.pooled], width)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        encoded = [encoder(captions, drop) for encoder in self.encoders]
        pairs = list(zip(self.parts, encoded, strict=True))
        texts = [one for part, one in pairs if part.tokens]
        pooled = [one.pooled for part, one in pairs if part.pooled]
        tokens = [into(one.tokens) for into, one in zip(self.tokens_in, texts, strict=True)]
        vectors = [into(one) for into, one in zip(self.pooled_in, pooled, strict=True)]
        return Condition(
            tokens=torch.cat(tokens, dim=1),  # b (l1 + l2 + ...) d
            mask=torch.cat([one.mask for one in texts], dim=1),
            pooled=torch.stack(vectors).sum(0),
        )


def _projections(encoders: list[Conditioner], width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(encoder.width, width) for encoder in encoders)
