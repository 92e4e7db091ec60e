"""Context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): the ranks of a group hold parts of the
tokens, and within attention all tokens of a part of the heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from jaxtyping import Shaped
from torch import Tensor


class TokenShards:
    """Divides ``num_tokens`` tokens over the ranks of a group, in order.

    Parts differ by one token at most; a rank has none where there are fewer tokens than ranks.
    Nothing is padded. The gradient of what all ranks receive is that of the sum of their losses.
    """

    def __init__(self, group: dist.ProcessGroup, num_tokens: int):
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        few, longer = divmod(num_tokens, self.size)
        self.lengths = [few + (rank < longer) for rank in range(self.size)]
        first = sum(self.lengths[: self.rank])
        self.own = slice(first, first + self.lengths[self.rank])

    def gather(self, x: Shaped[Tensor, "b own d"]) -> Shaped[Tensor, "b n d"]:
        """Return the tokens of all ranks from those of each."""
        x = repeat(x, "b n d -> (r n) b d", r=self.size)
        return rearrange(self._receive_tokens(x), "n b d -> b n d")

    def to_heads(
        self, x: Shaped[Tensor, "*b k own e"], num_shares: int = 1
    ) -> Shaped[Tensor, "*b own_k n e"]:
        """Return this rank's heads of all tokens from all heads of its tokens.

        The heads are in ``num_shares`` equal shares, of each of which a rank gets its part.
        """
        x = rearrange(x, "... (s r k) n e -> (r n) ... (s k) e", s=num_shares, r=self.size)
        return rearrange(self._receive_tokens(x), "n ... k e -> ... k n e")

    def to_tokens(
        self, x: Shaped[Tensor, "*b own_k n e"], num_shares: int = 1
    ) -> Shaped[Tensor, "*b k own e"]:
        """Return the inverse of ``to_heads``."""
        x = rearrange(x, "... k n e -> n ... k e")
        num_own = self.lengths[self.rank]
        x = _AllToAll.apply(x, self.lengths, [num_own] * self.size, self.group)
        pattern = "(r n) ... (s k) e -> ... (s r k) n e"
        return rearrange(x, pattern, s=num_shares, r=self.size)

    def own_heads(self, x: Shaped[Tensor, "b k l e"]) -> Shaped[Tensor, "b own_k l e"]:
        """Return the part of the heads that ``to_heads`` gives to this rank."""
        return x.chunk(self.size, dim=1)[self.rank]

    def _receive_tokens(self, x: Shaped[Tensor, "copies ..."]) -> Shaped[Tensor, "n ..."]:
        """Send one of the equal parts of ``x`` to each rank; return the parts from all."""
        num_own = self.lengths[self.rank]
        return _AllToAll.apply(x, [num_own] * self.size, self.lengths, self.group)


class _AllToAll(torch.autograd.Function):
    """Sends runs of rows to the ranks of a group. The gradient takes the way back."""

    @staticmethod
    def forward(
        x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        output = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), list(received), list(sent), group)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back = _AllToAll.apply(gradients[0], ctx.received, ctx.sent, ctx.group)
        return back, None, None, None
