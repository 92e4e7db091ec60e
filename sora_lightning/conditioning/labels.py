"""Class labels as conditions: one learned vector a class (DiT, arXiv 2212.09748, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.types import Condition


class LabelConditioner(Conditioner):
    """A caption is a class: its number, or its name where ``names`` lists them in order.

    The class's vector is the only token and the pooled vector too. An empty caption, or a dropped
    one, is the class of no label, a last row of the table; without ``null_class`` there is none.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        names: Sequence[str] | None = None,
        null_class: bool = True,
    ):
        super().__init__(width)
        if num_classes < 1:
            raise ValueError(f"num_classes = {num_classes} must be at least 1")
        if names is not None and len(set(names)) != num_classes:
            raise ValueError(
                f"names: {len(set(names))} different names for num_classes = {num_classes}"
            )
        self.num_classes = num_classes
        self.numbers = {name: number for number, name in enumerate(names or ())}
        self.null_class = null_class
        self.embedding = nn.Embedding(num_classes + null_class, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Raises ``ValueError`` for a caption that is no class."""
        rows = torch.tensor(
            [self.row(caption) for caption in captions], device=self.embedding.weight.device
        )
        if drop is not None and drop.any():
            rows = torch.where(drop, self.row(""), rows)
        return self.of_rows(rows)

    def of_rows(self, rows: Int[Tensor, " b"]) -> Condition:
        """The condition of rows of the table, where classes are known by number."""
        vectors = self.embedding(rows)  # b d
        mask = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
        return Condition(rearrange(vectors, "b d -> b 1 d"), mask, vectors)

    def row(self, caption: str) -> int:
        """The row of the table that a caption stands for."""
        caption = caption.strip()
        if not caption:
            if not self.null_class:
                raise ValueError(
                    "an empty caption, and null_class is off: every clip needs a class"
                )
            return self.num_classes
        if caption in self.numbers:
            return self.numbers[caption]
        if caption.isdecimal() and int(caption) < self.num_classes:
            return int(caption)
        raise ValueError(
            f"{caption!r} is no class: give a number from 0 to {self.num_classes - 1}"
            + (" or one of the names" if self.numbers else "")
        )
