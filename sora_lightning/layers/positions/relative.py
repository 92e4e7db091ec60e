"""Self-attention with a learned bias for the displacement of two tokens, as in W.A.L.T (arXiv
2312.06662, section 4.1; one table over displacements: arXiv 2103.14030).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sora_lightning.checks import require_three
from sora_lightning.layers.attention import NormFactory, SelfAttention
from sora_lightning.layers.groupings import SortedGroups
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import JOINT, HeadSplit, Partition, TokenPartition
from sora_lightning.layers.transformer import RMSNorm


class RelativeSelfAttention(SelfAttention):
    """Self-attention with a learned bias of each head for each displacement.

    ``reach`` is the largest displacement in frames, rows and columns with a value of its own;
    larger ones share the last. The default covers W.A.L.T's windows of 1 x 16 x 16 and 5 x 8 x 8.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        partition: TokenPartition | HeadSplit = JOINT,
        qk_norm: NormFactory | None = RMSNorm,
        bias: bool = True,
        reach: Sequence[int] = (4, 15, 15),
    ):
        super().__init__(width, num_heads, partition, qk_norm, bias)
        require_three(0, reach=reach)
        if len(partition.head_partitions) > 1:
            raise ValueError("relative positions are for layouts whose heads share one partition")
        self.reach = tuple(reach)
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * length + 1 for length in reach)))
        nn.init.trunc_normal_(self.table, std=0.02)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sequence: PackedSequence
    ) -> Float[Tensor, "b k n e"]:
        (partition,) = self.partition.head_partitions
        grouping = sequence.grouping(partition)
        places = grouping.group(rearrange(sequence.coordinates, "n three -> 1 1 n three"))
        # Boxes that tile one grid are all alike.
        alike = isinstance(partition, Partition) and not isinstance(grouping, SortedGroups)
        outputs = []
        parts = zip(grouping.group(q), grouping.group(k), grouping.group(v), places, strict=True)
        for queries, keys, values, place in parts:
            bias = self._bias(place[:1, 0] if alike else place[:, 0]).to(q.dtype)
            if not alike:  # every clip of a batch has these groups
                bias = bias.repeat(len(queries) // len(bias), 1, 1, 1)
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias))
        return grouping.ungroup(outputs)

    def _bias(self, places: Int[Tensor, "g m 3"]) -> Float[Tensor, "g k m m"]:
        apart = places[:, :, None] - places[:, None]
        reach = apart.new_tensor(self.reach)
        f, h, w = (apart.clamp(-reach, reach) + reach).unbind(-1)
        return rearrange(self.table[:, f, h, w], "k g m l -> g k m l")
