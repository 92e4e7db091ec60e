"""The kernel for sequences of varying length: called as torch asks for it, and equal to the mask.

It has no CPU form. Here a stand-in with its signature holds every argument to what the flash kernel
asks for and computes by a loop; on a CUDA device the kernel itself runs.
"""

import inspect
import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from sora_lightning.layers import attention
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import PER_FRAME, PER_POSITION, HeadSplit
from sora_lightning.types import TokenGrid
from tests.layers.test_packed_sequence import PARTITIONS, by_mask, random_grids

GRIDS = [*random_grids(5, 4), TokenGrid(2, 3, 4)]


def stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """``varlen_attn`` by its documentation: sequence i is tokens ``cu_seq[i]`` to ``cu_seq[i+1]``
    of ``T H D``.
    """
    assert query.shape == key.shape == value.shape
    assert query.ndim == 3
    assert all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.is_contiguous()
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    lengths = cu_seq_q.diff().tolist()
    assert min(lengths) > 0
    assert max_q == max_k == max(lengths)
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(outputs)


def test_the_stand_in_has_the_signature_of_the_installed_kernel():
    """Newer versions of torch only append parameters."""
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (stand_in, varlen.varlen_attn)
    )
    assert len(theirs) >= 10
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_every_partition_reaches_the_kernel_as_it_asks(partition, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "varlen_precision", lambda q: q.dtype)
    n = sum(grid.num_tokens for grid in GRIDS)
    tensors = [torch.randn(1, 4, n, 8, requires_grad=True) for _ in range(3)]
    direction = torch.randn(1, 4, n, 8)
    actual = attention.attend(*tensors, partition, PackedSequence(GRIDS))
    assert len(calls) == len(partition.head_partitions)
    expected = by_mask(*tensors, partition, GRIDS)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    given = torch.autograd.grad((actual * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_cpu_has_no_such_kernel():
    assert attention.varlen_precision(torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "partition", [PER_FRAME, PER_POSITION, HeadSplit((PER_POSITION, PER_FRAME))]
)
def test_the_kernel_equals_the_mask_in_half_precision(partition):
    draw = random.Random(0)
    grids = [TokenGrid(draw.randint(1, 9), draw.randint(4, 16), 8) for _ in range(6)]
    n = sum(grid.num_tokens for grid in grids)
    exact = [torch.randn(1, 4, n, 64, requires_grad=True) for _ in range(3)]
    half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    assert attention.varlen_precision(half[0]) == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16):  # queries may come from a norm in float32
        assert attention.varlen_precision(half[0].float()) == torch.bfloat16
    expected = by_mask(*exact, partition, grids)
    actual = attention.attend(*half, partition, PackedSequence(grids, "cuda"))
    direction = torch.randn(1, 4, n, 64)
    wanted = torch.autograd.grad((expected * direction).sum(), exact)
    given = torch.autograd.grad((actual * direction.to(actual)).sum(), half)
    for one, other in zip([actual, *given], [expected, *wanted], strict=True):
        error = (one.float().cpu() - other).norm() / other.norm()
        assert error < 2e-2  # bfloat16 has 8 bits
