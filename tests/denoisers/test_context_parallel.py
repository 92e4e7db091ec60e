"""Two processes (gloo) that divide the tokens of a ``DiT`` predict as one does, with its gradients,
in every attention layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sora_lightning.denoisers import DiT
from sora_lightning.denoisers.conditioning_variants import CrossAttentionDiT, InContextDiT
from sora_lightning.layers.partitions import (
    Alternating,
    AttentionLayout,
    FactorisedDotProduct,
    FactorisedEncoder,
    FactorisedSelfAttention,
    Joint,
    Skiparse,
    Windows,
)
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, PackedLatents
from tests.ranks import Pair

LAYOUTS = (
    Joint(),
    FactorisedSelfAttention(),
    FactorisedDotProduct(),
    Alternating(),
    Windows([[1, 2, 2], [2, 1, 3]]),
    FactorisedEncoder(1),
    Skiparse(2, 0),
)
SIZE = TransformerSize(2, 24, 4)


def make(kind: type[DiT], layout: AttentionLayout, checkpointing: bool = False) -> DiT:
    torch.manual_seed(0)
    network = kind(4, 8, SIZE, (1, 1, 1), layout, activation_checkpointing=checkpointing)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2)
    return network


def latents() -> dict[str, Tensor | PackedLatents]:
    torch.manual_seed(1)
    clips = [torch.randn(4, *shape) for shape in ((3, 2, 3), (1, 3, 3), (2, 3, 3))]
    shown = [torch.rand(clip.shape[1:]) < 0.6 for clip in clips]
    for mask in shown:
        mask[0, 0, 0] = True
    return {
        "even": torch.randn(2, 4, 3, 4, 3),
        "odd": torch.randn(2, 4, 3, 3, 3),
        "one token": torch.randn(2, 4, 1, 1, 1),  # the second rank has none
        "packed": PackedLatents(tuple(clips)),
        "packed, dropped": PackedLatents(tuple(clips), tuple(shown)),
    }


def loss_and_gradients(
    network: DiT, x: Tensor | PackedLatents, t: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    mask = torch.ones(len(x), 5, dtype=torch.bool)
    mask[0, 3:] = False
    condition = Condition(torch.randn(len(x), 5, 8), mask, torch.randn(len(x), 8))
    network.zero_grad()
    y = network(x, t, condition)
    clips = y.clips if isinstance(y, PackedLatents) else y.unbind()
    loss = torch.stack([clip.square().mean() for clip in clips]).mean()
    loss.backward()
    named = network.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal_to_one(network: DiT, x: Tensor | PackedLatents, t: Tensor) -> None:
    alone, expected = loss_and_gradients(network, x, t)
    network.context_group = dist.group.WORLD
    loss, gradients = loss_and_gradients(network, x, t)
    network.context_group = None
    assert gradients.keys() == expected.keys()
    for gradient in gradients.values():  # as FSDP2 does
        dist.all_reduce(gradient)
        gradient /= 2
    torch.testing.assert_close(loss, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def compare_some() -> None:
    dist.init_process_group("gloo")
    network = make(DiT, FactorisedDotProduct())
    for name in ("odd", "packed, dropped"):
        x = latents()[name]
        assert_equal_to_one(network, x, torch.linspace(0.1, 0.9, len(x)))
    dist.destroy_process_group()


def compare_all() -> None:
    dist.init_process_group("gloo")
    networks = [make(DiT, layout, isinstance(layout, Joint)) for layout in LAYOUTS]
    networks += [make(kind, Joint()) for kind in (InContextDiT, CrossAttentionDiT)]
    for network in networks:
        for x in latents().values():
            assert_equal_to_one(network, x, torch.linspace(0.1, 0.9, len(x)))
    some_known = torch.full((2, 27), 0.5)
    some_known[:, :9] = 0
    odd = latents()["odd"]
    assert_equal_to_one(make(DiT, FactorisedSelfAttention()), odd, some_known)
    dist.destroy_process_group()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop(patience_s=0)


def test_two_processes_have_the_loss_and_gradients_of_one(pair: Pair) -> None:
    pair.run(compare_some)


@pytest.mark.slow
def test_every_layout_has_the_loss_and_gradients_of_one_process(pair: Pair) -> None:
    pair.run(compare_all)
