"""A learned vector for each class: the condition of class-to-video models."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.types import Condition


class LabelConditioner(Conditioner):
    """Reads a caption as the name of a class. The empty caption, and a dropped one, is a further
    class, "none" (DiT, arXiv 2212.09748, section 4).

    The vector is the pooled one and the only text token too. ``ValueError`` for a caption that
    names no class.
    """

    def __init__(self, classes: Sequence[str], width: int = 384):
        super().__init__(width)
        self.classes = list(classes)
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise ValueError("classes: every class needs a name of its own, which is not empty")
        self.index = {name: i for i, name in enumerate(self.classes)}
        self.embedding = nn.Embedding(len(self.classes) + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        none = len(self.classes)
        rows = [none if not caption else self._row(caption) for caption in captions]
        labels = torch.tensor(rows, device=self.embedding.weight.device)
        if drop is not None:
            labels = torch.where(drop, none, labels)
        pooled = self.embedding(labels)  # b d
        mask = torch.ones(len(rows), 1, dtype=torch.bool, device=pooled.device)
        return Condition(tokens=pooled[:, None], mask=mask, pooled=pooled)

    def _row(self, caption: str) -> int:
        if caption not in self.index:
            some = ", ".join(self.classes[:5])
            raise ValueError(f"{caption!r} is none of the {len(self.classes)} classes: {some}, ...")
        return self.index[caption]
