"""Multi-head attention within the groups of a partition, and from video tokens to text tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sora_lightning.layers.groupings import Grouping, SortedGroups
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import JOINT, HeadSplit, Partition, TokenPartition
from sora_lightning.layers.positions.rotary import rotate
from sora_lightning.layers.transformer import RMSNorm, head_width

NormFactory = Callable[[int], nn.Module]


def attend(
    q: Float[Tensor, "b k n e"],
    k: Float[Tensor, "b k n e"],
    v: Float[Tensor, "b k n e"],
    partition: TokenPartition | HeadSplit,
    sequence: PackedSequence,
) -> Float[Tensor, "b k n e"]:
    """Attend within the groups of a partition, or with a share of the heads in each of several."""
    parts, shards = partition.head_partitions, sequence.shards
    if shards is None:
        return _attend_to_all(q, k, v, parts, sequence)
    q, k, v = shards.to_heads(torch.stack([q, k, v]), len(parts))
    return shards.to_tokens(_attend_to_all(q, k, v, parts, sequence), len(parts))


def _attend_to_all(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[TokenPartition], sequence: PackedSequence
) -> Tensor:
    if len(parts) == 1:
        return attend_in_groups(q, k, v, sequence.grouping(parts[0]))
    queries, keys, values = (x.chunk(len(parts), dim=1) for x in (q, k, v))
    return torch.cat(
        [
            attend_in_groups(q, k, v, sequence.grouping(part))
            for q, k, v, part in zip(queries, keys, values, parts, strict=True)
        ],
        dim=1,
    )


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, grouping: Grouping) -> Tensor:
    """Attend with one fused call for all groups of a length.

    On CUDA one call serves all groups where the kernel for varying lengths takes these tensors.
    """
    if isinstance(grouping, SortedGroups) and (dtype := varlen_precision(q)) is not None:
        return _attend_varlen(q.to(dtype), k.to(dtype), v.to(dtype), grouping)
    parts = zip(grouping.group(q), grouping.group(k), grouping.group(v), strict=True)
    return grouping.ungroup([F.scaled_dot_product_attention(*part) for part in parts])


def varlen_precision(q: Tensor) -> torch.dtype | None:
    """Return the precision in which ``torch.nn.attention.varlen`` takes these queries, or ``None``.

    Its flash kernel needs CUDA of capability 8.0, half precision (that of autocast counts), one
    packed sequence, and heads of a multiple of 8 up to 256 channels.
    """
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else q.dtype
    fits = q.shape[0] == 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return dtype if fits and dtype in (torch.float16, torch.bfloat16) else None


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, groups: SortedGroups) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (rearrange(groups.sort(x), "1 k n e -> n k e") for x in (q, k, v))
    longest = groups.longest
    y = varlen_attn(q, k, v, groups.cu_seqlens, groups.cu_seqlens, longest, longest)
    assert isinstance(y, Tensor)  # a pair only where more than the values is asked for
    return groups.unsort(rearrange(y, "n k e -> 1 k n e"))


def _head_norm(norm: NormFactory | None, width: int) -> nn.Module:
    return nn.Identity() if norm is None else norm(width)


class SelfAttention(nn.Module):
    """Self-attention within the groups of one partition.

    ``qk_norm`` makes the norm of queries and keys, which keeps logits bounded (arXiv 2302.05442,
    section 2.2); null is none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        partition: TokenPartition | HeadSplit = JOINT,
        qk_norm: NormFactory | None = RMSNorm,
        bias: bool = True,
    ):
        super().__init__()
        width_of_head = head_width(width, num_heads)
        if num_heads % len(partition.head_partitions):
            raise ValueError(
                f"num_heads = {num_heads}: must be a multiple of the "
                f"{len(partition.head_partitions)} partitions that share the heads"
            )
        self.num_heads = num_heads
        self.partition = partition
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = _head_norm(qk_norm, width_of_head)
        self.k_norm = _head_norm(qk_norm, width_of_head)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        angles: Float[Tensor, "n a"] | None,
        sequence: PackedSequence,
    ) -> Float[Tensor, "b n d"]:
        """``angles`` are rotary positions of queries and keys; ``None`` is no rotation."""
        # Each third by itself: the gradients then meet in one copy, not in two.
        q, k, v = (
            rearrange(third, "b n (k e) -> b k n e", k=self.num_heads)
            for third in self.qkv(x).chunk(3, dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = self.attend(q, k, v, sequence)  # b k n e
        return self.out(rearrange(y, "b k n e -> b n (k e)"))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sequence: PackedSequence
    ) -> Float[Tensor, "b k n e"]:
        """Return the heads' outputs for queries and keys that have their positions."""
        return attend(q, k, v, self.partition, sequence)


class CrossAttention(nn.Module):
    """Cross-attention from video tokens to the text tokens of their clip."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: NormFactory | None = RMSNorm,
        bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(width, 2 * width, bias=bias)
        self.q_norm = _head_norm(qk_norm, width // num_heads)
        self.k_norm = _head_norm(qk_norm, width // num_heads)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "clips l d"],
        mask: Bool[Tensor, "clips l"],
        sequence: PackedSequence,
    ) -> Float[Tensor, "b n d"]:
        """``text`` holds one row for each clip of the batch or of the packed sequence."""
        q, (k, v) = self._queries(x), self._keys_values(text)
        if not sequence.is_packed:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        else:
            y = self._attend_packed(q, k, v, mask, sequence)
        return self.out(rearrange(y, "b k n e -> b n (k e)"))

    def _queries(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k n e"]:
        return self.q_norm(rearrange(self.q(x), "b n (k e) -> b k n e", k=self.num_heads))

    def _keys_values(
        self, x: Float[Tensor, "b l d"]
    ) -> tuple[Float[Tensor, "b k l e"], Float[Tensor, "b k l e"]]:
        k, v = (
            rearrange(half, "b l (k e) -> b k l e", k=self.num_heads)
            for half in self.kv(x).chunk(2, dim=-1)
        )
        return self.k_norm(k), v

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sequence: PackedSequence
    ) -> Tensor:
        """Attend with one fused call for all clips of a length."""
        assert sequence.clips_by_length is not None
        clips, shards = sequence.grouping(JOINT), sequence.shards
        if shards is not None:
            q, k, v = shards.to_heads(q), shards.own_heads(k), shards.own_heads(v)
        parts = clips.group(q)
        texts = sequence.clips_by_length.split([len(part) for part in parts])
        y = clips.ungroup(
            [
                F.scaled_dot_product_attention(
                    part, k[text], v[text], attn_mask=mask[text][:, None, None, :]
                )
                for part, text in zip(parts, texts, strict=True)
            ]
        )
        return y if shards is None else shards.to_tokens(y)


class JointTextAttention(CrossAttention):
    """Attention from the tokens of a window to these tokens and to the text of their clip, in one
    softmax (W.A.L.T, arXiv 2312.06662, section 3.2).

    One projection makes both kinds of keys. ``window`` counts frames, rows and columns of tokens;
    null is the clip's whole extent. W.A.L.T's window is one frame, in its spatial blocks only.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: NormFactory | None = RMSNorm,
        bias: bool = True,
        window: Sequence[int | None] = (1, None, None),
    ):
        super().__init__(width, num_heads, qk_norm, bias)
        if len(window) != 3:
            raise ValueError(f"window = {list(window)} must be three: frames, rows, columns")
        frames, rows, columns = window
        self.partition = Partition(frames, rows, columns)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "clips l d"],
        mask: Bool[Tensor, "clips l"],
        sequence: PackedSequence,
    ) -> Float[Tensor, "b n d"]:
        grouping = sequence.grouping(self.partition)
        if sequence.is_packed:
            clip = rearrange(sequence.clip_of_token, "n -> 1 1 n 1")
        else:
            clip = repeat(torch.arange(len(x), device=x.device), "b -> b 1 n 1", n=x.shape[1])
        tensors = (self._queries(x), *self._keys_values(x), clip)
        text_k, text_v = self._keys_values(text)
        outputs = []
        for q, k, v, clips in zip(*(grouping.group(one) for one in tensors), strict=True):
            own = clips[:, 0, 0, 0]  # the clip of each group
            seen = F.pad(mask[own], (k.shape[-2], 0), value=True)
            k, v = torch.cat([k, text_k[own]], dim=-2), torch.cat([v, text_v[own]], dim=-2)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
            outputs.append(attended)
        return self.out(rearrange(grouping.ungroup(outputs), "b k n e -> b n (k e)"))
