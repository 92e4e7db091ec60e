"""Which tokens see each other: an attention layout is a list of partitions of a clip's tokens into
groups.

Joint attention is one group a clip; per frame, the groups are frames; per position, they are the
tubes through time; windows are boxes. One key over the coordinates ``(frame, row, column)`` defines
them all, and on an even grid the same groups are a reshape. Layouts say which partitions stand in
which block: ViViT (arXiv 2103.15691, section 3.3), Latte (arXiv 2401.03048, section 3.2), W.A.L.T
(arXiv 2312.06662, section 3.2).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from sora_lightning.types import TokenGrid


@dataclass(frozen=True)
class Partition:
    """Boxes of ``frames`` x ``rows`` x ``columns`` tokens; ``None`` stands for the clip's whole
    extent.
    """

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None

    def box(self, grid: TokenGrid) -> tuple[int, int, int]:
        """The box's extent on a grid. ``ValueError`` where boxes do not tile the grid."""
        box = (self.frames or grid.f, self.rows or grid.h, self.columns or grid.w)
        for name, part, whole in zip(("f", "h", "w"), box, (grid.f, grid.h, grid.w), strict=True):
            if whole % part:
                raise ValueError(f"{self}: {part} does not divide {name} = {whole} of {grid}")
        return box

    def is_whole(self, grid: TokenGrid) -> bool:
        """Whether the only group is the clip itself."""
        return self.box(grid) == (grid.f, grid.h, grid.w)

    def group(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """``b n d`` to ``(b groups) m d``: the tokens of each group side by side."""
        p, q, r = self.box(grid)
        f, h, w = grid.f // p, grid.h // q, grid.w // r
        return rearrange(
            x, "b (f p h q w r) d -> (b f h w) (p q r) d", f=f, p=p, h=h, q=q, w=w, r=r
        )

    def ungroup(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """The inverse of ``group``."""
        p, q, r = self.box(grid)
        f, h, w = grid.f // p, grid.h // q, grid.w // r
        return rearrange(
            x, "(b f h w) (p q r) d -> b (f p h q w r) d", f=f, p=p, h=h, q=q, w=w, r=r
        )

    def mask(self, coordinates: Int[Tensor, "n 3"], grid: TokenGrid) -> Bool[Tensor, "n n"]:
        """The definition: True where two tokens share a box. Slow; the tests hold ``group`` to
        it.
        """
        key = coordinates // coordinates.new_tensor(self.box(grid))
        return (key[:, None] == key[None]).all(dim=-1)


JOINT = Partition()
PER_FRAME = Partition(frames=1)
PER_POSITION = Partition(rows=1, columns=1)


class AttentionLayout(ABC):
    """Chooses the partitions of each block: one self-attention for each, in order."""

    @abstractmethod
    def partitions(self, block: int) -> tuple[Partition, ...]:
        """The partitions of the block with this index, counted from 0."""


class Joint(AttentionLayout):
    """Every token sees every other of its clip (ViViT model 1)."""

    def partitions(self, block: int) -> tuple[Partition, ...]:
        return (JOINT,)


class FactorisedSelfAttention(AttentionLayout):
    """Each block attends within frames, then through time at each position (ViViT model 3)."""

    def partitions(self, block: int) -> tuple[Partition, ...]:
        return (PER_FRAME, PER_POSITION)


class Alternating(AttentionLayout):
    """Blocks attend within frames and through time by turns (Latte variant 1)."""

    def partitions(self, block: int) -> tuple[Partition, ...]:
        return (PER_POSITION if block % 2 else PER_FRAME,)
