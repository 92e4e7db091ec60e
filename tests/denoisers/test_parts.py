"""The parts of a DiT: each works in every sequence and does what its source says."""

from functools import partial

import pytest
import torch
from torch import nn

from sora_lightning.denoisers import DiT, DiTParts
from sora_lightning.denoisers.base import clip_by_clip
from sora_lightning.denoisers.blocks import (
    AdaLNBlock,
)
from sora_lightning.denoisers.conditioning_variants import (
    CrossAttentionDiT,
    InContextDiT,
    UngatedAdaLNBlock,
)
from sora_lightning.denoisers.conditions import NoCondition, PooledOnly, TextAndPooled, TextOnly
from sora_lightning.denoisers.modulation import AdaLNLoRA, AdaLNTable
from sora_lightning.layers.attention import JointTextAttention
from sora_lightning.layers.partitions import Alternating
from sora_lightning.layers.positions.absolute import (
    Fractional,
    Learned,
    Sinusoidal,
    SinusoidalPlane,
    SinusoidalTime,
)
from sora_lightning.layers.positions.relative import RelativeSelfAttention
from sora_lightning.layers.transformer import RMSNorm, SwiGLU, TransformerSize
from sora_lightning.types import Condition, PackedLatents

NETWORKS = {
    "adaLN": partial(DiT, parts=DiTParts(UngatedAdaLNBlock)),
    "in-context": InContextDiT,
    "cross-attention": partial(CrossAttentionDiT, parts=DiTParts(condition=PooledOnly)),
    "adaLN-LoRA": partial(
        DiT, parts=DiTParts(partial(AdaLNBlock, modulation=partial(AdaLNLoRA, rank=3)))
    ),
    "adaLN-single": partial(
        DiT, parts=DiTParts(partial(AdaLNBlock, modulation=AdaLNTable, text_norm=None), TextOnly)
    ),
    "W.A.L.T's attentions": partial(
        DiT,
        parts=DiTParts(
            partial(
                AdaLNBlock, self_attention=RelativeSelfAttention, cross_attention=JointTextAttention
            )
        ),
    ),
    "RMS, SwiGLU, plain heads": partial(
        DiT,
        parts=DiTParts(
            partial(AdaLNBlock, norm=RMSNorm, feed_forward=SwiGLU, qk_norm=None, bias=False)
        ),
    ),
    "text in every second block": partial(
        DiT, parts=DiTParts(condition=partial(TextAndPooled, text_every=2))
    ),
    "unconditional": partial(DiT, parts=DiTParts(condition=NoCondition)),
    "learned": partial(
        DiT, parts=DiTParts(positions=[partial(Learned, grid=(5, 4, 4))], rotary=None)
    ),
    "fractional": partial(DiT, parts=DiTParts(positions=[Fractional], rotary=None)),
    "plane and time": partial(
        DiT, parts=DiTParts(positions=[SinusoidalPlane, SinusoidalTime], rotary=None)
    ),
    "rotary alone": partial(DiT, parts=DiTParts(positions=[])),
}
EXTENTS = [(3, 4, 4), (1, 2, 6), (5, 6, 2), (3, 4, 4)]


def build(network=DiT, trained=True, **options):
    dit = network(4, 24, size=TransformerSize(3, 24, 2), patch=(1, 2, 2), **options)
    if trained:
        for parameter in dit.parameters():
            nn.init.normal_(parameter, std=0.15)
    return dit


def condition(b):
    mask = torch.arange(4) < torch.randint(1, 5, (b, 1))
    return Condition(torch.randn(b, 4, 24), mask, torch.randn(b, 24))


def packed():
    clips = tuple(torch.randn(4, *extent) for extent in EXTENTS)
    return PackedLatents(clips), torch.rand(len(clips)), condition(len(clips))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_packed_equals_separate_with_every_part(network):
    dit = build(network)
    x_t, t, cond = packed()
    together = dit(x_t, t, cond)
    for one, other in zip(together.clips, clip_by_clip(dit, x_t, t, cond).clips, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    sum(clip.square().sum() for clip in together.clips).backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or "k_norm" in name, name


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_new_network_predicts_zero_whatever_its_parts(network):
    x = torch.randn(2, 4, 3, 4, 4)
    assert torch.equal(build(network, trained=False)(x, torch.rand(2), condition(2)), 0 * x)


@pytest.mark.parametrize("modulation", [partial(AdaLNLoRA, rank=3), AdaLNTable])
def test_a_new_block_is_the_identity_where_blocks_share_a_modulation(modulation):
    dit = build(parts=DiTParts(partial(AdaLNBlock, modulation=modulation)), trained=False)
    nn.init.normal_(dit.final.out.weight)  # so that the tokens are seen
    x, t, cond = torch.randn(2, 4, 3, 4, 4), torch.rand(2), condition(2)
    through = dit(x, t, cond)
    dit.blocks = dit.blocks[:1]
    assert through.abs().max() > 0.1
    torch.testing.assert_close(dit(x, t, cond), through)


def test_times_of_tokens_need_adaptive_norm():
    known = torch.rand(2, 1).repeat(1, 12)
    known[:, :4] = 0
    for network in (NETWORKS["in-context"], NETWORKS["cross-attention"]):
        with pytest.raises(ValueError, match="one time for each clip"):
            build(network)(torch.randn(2, 4, 3, 4, 4), known, condition(2))


def test_in_context_blocks_ask_for_joint_attention():
    with pytest.raises(ValueError, match="layout: in-context blocks"):
        build(NETWORKS["in-context"], layout=Alternating())


def test_text_reaches_every_second_block_alone():
    dit = build(NETWORKS["text in every second block"])
    assert [block.text is not None for block in dit.blocks] == [True, False, True]
    assert build(NETWORKS["unconditional"]).blocks[0].text is None


def test_a_label_of_another_width_is_refused():
    with pytest.raises(ValueError, match="width 16 is added to a network of width 24"):
        DiT(4, 16, TransformerSize(12, 24, 2), parts=DiTParts(condition=PooledOnly))


def test_recomputed_blocks_give_the_same_gradients_and_are_recomputed():
    dit, calls = build(), []
    dit.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    x, t, cond = torch.randn(2, 4, 3, 4, 4), torch.rand(2), condition(2)
    gradients = []
    for dit.activation_checkpointing in (False, True):
        dit.zero_grad()
        dit(x, t, cond).square().sum().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert len(calls) == 3  # once, and then twice
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_learned_sigma_doubles_the_channels_of_the_prediction():
    dit = build(learned_sigma=True)
    assert dit(torch.randn(2, 4, 3, 4, 4), torch.rand(2), condition(2)).shape == (2, 8, 3, 4, 4)
    x_t, t, cond = packed()
    shapes = [tuple(clip.shape) for clip in dit(x_t, t, cond).clips]
    assert shapes == [(8, *extent) for extent in EXTENTS]


def test_self_conditioning_reads_the_estimate_and_none_is_zeros():
    dit = build(self_conditioning=True)
    x, t, cond = torch.randn(2, 4, 3, 4, 4), torch.rand(2), condition(2)
    base = dit(x, t, cond)
    torch.testing.assert_close(dit(x, t, cond, torch.zeros_like(x)), base)
    assert not torch.allclose(dit(x, t, cond, torch.ones_like(x)), base)
    x_t, t, cond = packed()
    estimate = x_t.map(torch.randn_like)
    together = dit(x_t, t, cond, estimate).clips
    for i, (clip, guess) in enumerate(zip(x_t.clips, estimate.clips, strict=True)):
        alone = dit(clip[None], t[i : i + 1], cond[i : i + 1], guess[None])[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="for a network with self_conditioning"):
        build()(x, torch.rand(2), condition(2), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network_computes_in_the_precision_of_its_weights(network, dtype):
    """Known frames, packed and dense; the latents may come in another precision."""
    dit = build(network)
    x, t, cond = torch.randn(2, 4, 3, 4, 4), torch.tensor([0.25, 0.75]), condition(2)
    expected = dit(x, t, cond)[0]
    dit.to(dtype)
    cond = Condition(cond.tokens.to(dtype), cond.mask, cond.pooled.to(dtype))
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-5
    for latents in (x, x.to(dtype)):
        (y,) = dit(PackedLatents((latents[0],)), t[:1].to(dtype), cond[:1]).clips
        for made in (dit(latents, t.to(dtype), cond)[0], y):
            assert made.dtype == dtype
            assert (made.float() - expected).norm() < tolerance * expected.norm()


def test_swiglu_has_as_many_parameters_as_gelu():
    width = 96
    gated, plain = (sum(p.numel() for p in ff.parameters() if p.ndim == 2) for ff in (
        SwiGLU(width, 4 * width), build().blocks[0].mlp.__class__(width, 4 * width)))  # fmt: skip
    assert gated == plain


def test_positions_stand_before_the_block_that_they_name():
    with pytest.raises(ValueError, match="before_block = 3 of SinusoidalTime: must be at most 2"):
        build(parts=DiTParts(positions=[Sinusoidal, partial(SinusoidalTime, before_block=3)]))
    early = build(parts=DiTParts(positions=[partial(SinusoidalTime, before_block=0)], rotary=None))
    late = build(parts=DiTParts(positions=[partial(SinusoidalTime, before_block=1)], rotary=None))
    late.load_state_dict(early.state_dict())
    x, t, cond = torch.randn(1, 4, 3, 4, 4), torch.rand(1), condition(1)
    assert not torch.allclose(early(x, t, cond), late(x, t, cond), atol=1e-4)
