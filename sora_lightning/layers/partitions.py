"""Which tokens see each other: an attention layout is a list of partitions of a clip's tokens into
groups.

Joint attention is one group for each clip; per frame, the groups are frames; per position, they are
tubes through time; windows are boxes; skipping takes every k-th token. A partition is defined by a
function from coordinates ``(frame, row, column)`` to the index of the token's group. Groups of one
length are a reshape as well. A layout chooses the partitions of each block: ViViT (arXiv
2103.15691, section 3.3), Latte (arXiv 2401.03048, section 3.2), W.A.L.T (arXiv 2312.06662, section
3.2), Open-Sora-Plan (arXiv 2412.00131).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from sora_lightning.checks import require_at_least
from sora_lightning.configuration import KeepsArguments
from sora_lightning.layers.groupings import Regrouping
from sora_lightning.types import TokenGrid


class TokenPartition(ABC):
    """Divides a clip's tokens into groups; tokens of one group see each other."""

    @abstractmethod
    def group_indices(self, coordinates: Int[Tensor, "n 3"], grid: TokenGrid) -> Int[Tensor, " n"]:
        """Return the index of each token's group, any integers of at least 0. This is the
        definition.
        """

    def regrouping(self, grid: TokenGrid) -> Regrouping | None:
        """Return the groups as a reshape of the frame-major tokens, or ``None`` for no reshape."""
        return None

    def is_whole(self, grid: TokenGrid) -> bool:
        """Return True if one group covers the whole clip (full attention)."""
        return False

    @property
    def head_partitions(self) -> tuple[TokenPartition, ...]:
        """The partitions among which an attention divides its heads evenly: this one only."""
        return (self,)

    def mask(self, coordinates: Int[Tensor, "n 3"], grid: TokenGrid) -> Bool[Tensor, "n n"]:
        """Return True where two tokens see each other. Slow; tests compare fast paths with it."""
        number = self.group_indices(coordinates, grid)
        return number[:, None] == number


@dataclass(frozen=True)
class Partition(TokenPartition):
    """Boxes of ``frames`` x ``rows`` x ``columns`` tokens; ``None`` is the clip's whole extent.

    Boxes are cut at the border of the clip. ``images_apart`` makes every token of a one-frame clip
    a group of its own.
    """

    frames: int | None = None
    rows: int | None = None
    columns: int | None = None
    images_apart: bool = False

    def __post_init__(self) -> None:
        lengths = {"frames": self.frames, "rows": self.rows, "columns": self.columns}
        require_at_least(1, where="Partition: ", **lengths)

    def box(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Return the extent of the first box on a grid."""
        if self.images_apart and grid.f == 1:
            return (1, 1, 1)
        return (
            min(self.frames or grid.f, grid.f),
            min(self.rows or grid.h, grid.h),
            min(self.columns or grid.w, grid.w),
        )

    def is_whole(self, grid: TokenGrid) -> bool:
        return self.box(grid) == (grid.f, grid.h, grid.w)

    def group_indices(self, coordinates: Int[Tensor, "n 3"], grid: TokenGrid) -> Int[Tensor, " n"]:
        f, h, w = (coordinates // coordinates.new_tensor(self.box(grid))).unbind(-1)
        return (f * grid.h + h) * grid.w + w

    def regrouping(self, grid: TokenGrid) -> Regrouping | None:
        p, q, r = self.box(grid)
        if grid.f % p or grid.h % q or grid.w % r:
            return None
        f, h, w = grid.f // p, grid.h // q, grid.w // r
        sizes = (("f", f), ("p", p), ("h", h), ("q", q), ("w", w), ("r", r))
        return Regrouping("f p h q w r", "f h w", "p q r", sizes)

    def group(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Return ``b n d`` as ``(b groups) m d``.

        Raises ``ValueError`` if the boxes do not tile the grid.
        """
        return self._tiling(grid).group(x)[0]

    def ungroup(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Return the inverse of ``group``."""
        return self._tiling(grid).ungroup([x])

    def _tiling(self, grid: TokenGrid) -> Regrouping:
        if (regrouping := self.regrouping(grid)) is not None:
            return regrouping
        extents = (grid.f, grid.h, grid.w)
        for name, part, whole in zip("fhw", self.box(grid), extents, strict=True):
            if whole % part:
                raise ValueError(f"{self}: {part} does not divide {name} = {whole} of {grid}")
        raise AssertionError("a box that divides every extent tiles the grid")


@dataclass(frozen=True)
class Skip(TokenPartition):
    """``ratio`` groups for each clip, to which runs of ``run`` tokens are dealt in turn
    (Open-Sora-Plan).

    ``run`` = 1 is its single skip, ``run`` = ``ratio`` its group skip (``_sparse_1d`` of its
    ``models/diffusion/opensora_v1_3/modules.py``). Tokens are counted frame-major. Nothing is
    padded: groups differ in length if the ratio does not divide the clip.
    """

    ratio: int
    run: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, where="Skip: ", ratio=self.ratio, run=self.run)

    def is_whole(self, grid: TokenGrid) -> bool:
        return self.ratio == 1

    def group_indices(self, coordinates: Int[Tensor, "n 3"], grid: TokenGrid) -> Int[Tensor, " n"]:
        f, h, w = coordinates.unbind(-1)
        return ((f * grid.h + h) * grid.w + w) // self.run % self.ratio

    def regrouping(self, grid: TokenGrid) -> Regrouping | None:
        if grid.num_tokens % (self.ratio * self.run):
            return None
        return Regrouping("n m k", "m", "n k", (("m", self.ratio), ("k", self.run)))


@dataclass(frozen=True)
class HeadSplit:
    """One attention whose heads are divided evenly among partitions (ViViT model 4)."""

    head_partitions: tuple[TokenPartition, ...]


JOINT = Partition()
PER_FRAME = Partition(frames=1)
PER_POSITION = Partition(rows=1, columns=1)

BlockPartitions = tuple[TokenPartition | HeadSplit, ...]


class AttentionLayout(KeepsArguments, ABC):
    """Chooses the partitions of each block; a block has one self-attention for each."""

    @abstractmethod
    def schedule(self, depth: int) -> list[BlockPartitions]:
        """Return the partitions of each of ``depth`` blocks."""


class Periodic(AttentionLayout):
    """Blocks take the members of a cycle in turn."""

    def __init__(self, cycle: Sequence[BlockPartitions]):
        if not cycle or not all(cycle):
            raise ValueError(f"{type(self).__name__}: needs one partition at least")
        self.cycle = tuple(cycle)

    def partitions(self, block: int) -> BlockPartitions:
        """Return the partitions of the block with this index, counted from 0."""
        return self.cycle[block % len(self.cycle)]

    def schedule(self, depth: int) -> list[BlockPartitions]:
        return [self.partitions(block) for block in range(depth)]


class Joint(Periodic):
    """Every token sees every other of its clip (ViViT model 1)."""

    def __init__(self) -> None:
        super().__init__([(JOINT,)])


class FactorisedSelfAttention(Periodic):
    """Each block attends within frames, then through time at each position (ViViT model 3, Latte
    variant 3).
    """

    def __init__(self) -> None:
        super().__init__([(PER_FRAME, PER_POSITION)])


class FactorisedDotProduct(Periodic):
    """Half of the heads attend through time, half within frames (ViViT model 4, Latte variant 4).

    Time comes first, as in ViViT's public code.
    """

    def __init__(self) -> None:
        super().__init__([(HeadSplit((PER_POSITION, PER_FRAME)),)])


class Alternating(Periodic):
    """Blocks attend within frames and through time in turn (Latte variant 1)."""

    def __init__(self) -> None:
        super().__init__([(PER_FRAME,), (PER_POSITION,)])


class Windows(Periodic):
    """Blocks attend within windows, in turn. W.A.L.T's windows are [[1, 16, 16], [5, 8, 8]].

    A window counts frames, rows and columns of tokens; null is the clip's whole extent. With
    ``images_apart`` the tokens of an image do not see each other in windows of several frames, as
    in W.A.L.T's joint training on images and videos (section 3.2).
    """

    def __init__(self, windows: Sequence[Sequence[int | None]], images_apart: bool = False):
        for window in windows:
            if len(window) != 3:
                raise ValueError(
                    f"windows: {list(window)} must be three numbers: frames, rows, columns"
                )
        super().__init__([(Partition(f, h, w, images_apart and f != 1),) for f, h, w in windows])


class FactorisedEncoder(AttentionLayout):
    """The first ``num_spatial`` blocks attend within frames, all others through time (ViViT model
    2, Latte variant 2).
    """

    def __init__(self, num_spatial: int):
        self.num_spatial = num_spatial

    def schedule(self, depth: int) -> list[BlockPartitions]:
        if not 0 < self.num_spatial < depth:
            raise ValueError(
                f"num_spatial = {self.num_spatial} of {depth} blocks: must leave blocks of both "
                f"kinds, 1 to {depth - 1}"
            )
        num_temporal = depth - self.num_spatial
        spatial: BlockPartitions = (PER_FRAME,)
        return [spatial] * self.num_spatial + [(PER_POSITION,)] * num_temporal


class Skiparse(AttentionLayout):
    """The first and last ``num_joint`` blocks are joint; those between take single and group skips
    in turn (Open-Sora-Plan 1.3, with its ratio and its two joint blocks at either end).
    """

    def __init__(self, ratio: int = 4, num_joint: int = 2):
        require_at_least(0, num_joint=num_joint)
        self.skips = (Skip(ratio), Skip(ratio, run=ratio))
        self.num_joint = num_joint

    def schedule(self, depth: int) -> list[BlockPartitions]:
        if depth <= 2 * self.num_joint:
            raise ValueError(
                f"num_joint = {self.num_joint} at either end of {depth} blocks leaves none that "
                "skips"
            )
        joint: BlockPartitions = (JOINT,)
        return [
            (self.skips[block % 2],) if self.num_joint <= block < depth - self.num_joint else joint
            for block in range(depth)
        ]
