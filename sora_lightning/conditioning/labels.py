"""Class labels, each a learned vector, for class-to-video models."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.types import Condition


class LabelConditioner(Conditioner):
    """Reads a caption as the name of a class. Empty and dropped captions are one more class (DiT,
    arXiv 2212.09748, section 4), unless ``null_class`` is False.

    The class's vector is the pooled vector and the only text token. Raises ``ValueError`` for a
    caption that names no class.
    """

    def __init__(self, classes: Sequence[str], width: int = 384, null_class: bool = True):
        super().__init__(width)
        self.classes = list(classes)
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise ValueError("classes: every class needs a name of its own, which is not empty")
        self.index = {name: i for i, name in enumerate(self.classes)}
        self.null_class = null_class
        self.embedding = nn.Embedding(len(self.classes) + null_class, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        rows = [self._row(caption) for caption in captions]
        labels = torch.tensor(rows, device=self.embedding.weight.device)
        if drop is not None and drop.any():
            labels = torch.where(drop, self._row(""), labels)
        return self.of_rows(labels)

    def of_rows(self, rows: Int[Tensor, " b"]) -> Condition:
        """Return the condition of classes by their rows of the table."""
        pooled = self.embedding(rows)  # b d
        mask = torch.ones(len(rows), 1, dtype=torch.bool, device=pooled.device)
        return Condition(tokens=pooled[:, None], mask=mask, pooled=pooled)

    def _row(self, caption: str) -> int:
        if not caption and self.null_class:
            return len(self.classes)
        if caption not in self.index:
            some = ", ".join(self.classes[:5])
            raise ValueError(f"{caption!r} is none of the {len(self.classes)} classes: {some}, ...")
        return self.index[caption]
