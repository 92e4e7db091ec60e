"""The fast paths of a partition: tokens to batches of groups of one length each, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import FunctionCtx


@runtime_checkable
class Grouping(Protocol):
    """The groups of one partition of the tokens ``n`` of ``b ... n d``."""

    def group(self, x: Tensor) -> list[Tensor]:
        """Return ``b ... n d`` as ``(b groups) ... m d``, one tensor for each length m."""

    def ungroup(self, parts: list[Tensor]) -> Tensor:
        """Return the inverse of ``group``."""


class Whole:
    """One group that holds the whole clip: no token moves."""

    def group(self, x: Tensor) -> list[Tensor]:
        return [x]

    def ungroup(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class Regrouping:
    """Groups of one length as a reshape, by einops patterns of tokens, groups and members."""

    tokens: str
    groups: str
    members: str
    sizes: tuple[tuple[str, int], ...]

    def group(self, x: Tensor) -> list[Tensor]:
        pattern = f"b ... ({self.tokens}) d -> (b {self.groups}) ... ({self.members}) d"
        return [rearrange(x, pattern, **dict(self.sizes))]

    def ungroup(self, parts: list[Tensor]) -> Tensor:
        pattern = f"(b {self.groups}) ... ({self.members}) d -> b ... ({self.tokens}) d"
        return rearrange(parts[0], pattern, **dict(self.sizes))


@dataclass(frozen=True)
class SortedGroups:
    """Any groups: tokens sorted by group, groups by length, and runs of groups of one length.

    ``order`` takes the tokens to their sorted places and ``inverse`` back. ``runs`` holds the
    number of groups and their length. ``cu_seqlens`` (int32, one more than groups) are the
    cumulative lengths of the sorted groups, as kernels for varying lengths take them.
    """

    order: Int[Tensor, " n"]
    inverse: Int[Tensor, " n"]
    runs: tuple[tuple[int, int], ...]
    cu_seqlens: Int[Tensor, " g"]

    @classmethod
    def of(cls, group_indices: Int[Tensor, " n"], device: torch.device) -> SortedGroups:
        """Build from the index of each token's group. Groups of one length stay in the order of
        their indices.
        """
        _, group, length = torch.unique(group_indices, return_inverse=True, return_counts=True)
        by_length = torch.argsort(length, stable=True)
        order = torch.argsort(torch.argsort(by_length)[group], stable=True)
        sizes, counts = torch.unique_consecutive(length[by_length], return_counts=True)
        cu_seqlens = torch.cat([length.new_zeros(1), length[by_length].cumsum(0)])
        return cls(
            order=order.to(device, non_blocking=True),
            inverse=torch.argsort(order).to(device, non_blocking=True),
            runs=tuple(zip(counts.tolist(), sizes.tolist(), strict=True)),
            cu_seqlens=cu_seqlens.to(device, torch.int32, non_blocking=True),
        )

    @property
    def longest(self) -> int:
        """Length of the longest group."""
        return self.runs[-1][1]

    def sort(self, x: Tensor) -> Tensor:
        """Return the tokens ``n`` of ``... n d`` in sorted order."""
        return _Reorder.apply(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        """Return the inverse of ``sort``."""
        return _Reorder.apply(x, self.inverse, self.order)

    def group(self, x: Tensor) -> list[Tensor]:
        parts = self.sort(x).split([count * length for count, length in self.runs], dim=-2)
        return [
            rearrange(part, "b ... (g m) d -> (b g) ... m d", g=count)
            for part, (count, _) in zip(parts, self.runs, strict=True)
        ]

    def ungroup(self, parts: list[Tensor]) -> Tensor:
        runs = [
            rearrange(part, "(b g) ... m d -> b ... (g m) d", g=count)
            for part, (count, _) in zip(parts, self.runs, strict=True)
        ]
        return self.unsort(torch.cat(runs, dim=-2))


class _Reorder(torch.autograd.Function):
    """A permutation of the tokens whose gradient is the inverse permutation. Plain indexing would
    accumulate the gradients, which is slow.
    """

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(-2, order)

    @staticmethod
    def setup_context(
        ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0].index_select(-2, inverse), None, None
