"""muP: a few steps change activations equally at all widths, and without it they do not."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from sora_lightning.denoisers import DiT, DiTParts, UViT
from sora_lightning.denoisers.blocks import AdaLNBlock, TimeEmbedding
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems.optimizers import MaximalUpdate, MuonAdamW, parameter_groups
from sora_lightning.types import Condition

BASE, HEAD = 64, 16
OPTIMIZERS = {"adamw": partial(AdamW, lr=4e-3), "muon": partial(MuonAdamW, lr=8e-3)}


def network(width: int, base_width: int | None = BASE) -> DiT:
    # Without its norm, queries and keys show how large the logits grow.
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None), time=partial(TimeEmbedding, base_width=base_width)
    )
    size = TransformerSize(2, width, width // HEAD)
    return DiT(4, 8, size=size, patch=(1, 2, 2), parts=parts)


def changes_by_training(width: int, optimizer: Any, mup: bool) -> dict[str, float]:
    """Return by how much a few steps on one batch change activations, logits and output (root mean
    square).
    """
    torch.manual_seed(0)
    denoiser = network(width, BASE if mup else None)
    factory = MaximalUpdate(BASE, optimizer).for_module(denoiser) if mup else optimizer
    built = factory(parameter_groups(denoiser))
    rng = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 4, 4, 3, 8, 8, generator=rng)
    mask = torch.ones(4, 3, dtype=torch.bool)
    text = Condition(torch.randn(4, 3, 8, generator=rng), mask, torch.randn(4, 8, generator=rng))
    t = torch.linspace(0.1, 0.9, 4)
    before = activations(denoiser, x, t, text)
    for _ in range(6):
        loss = (denoiser(x, t, text) - target).square().mean()
        built.zero_grad()
        loss.backward()
        built.step()
    after = activations(denoiser, x, t, text)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


@torch.no_grad()
def activations(denoiser: DiT, *inputs: Any) -> dict[str, torch.Tensor]:
    """Return the outputs of parts of the network, and the attention logits of a block."""
    seen: dict[str, torch.Tensor] = {}
    names = ("time", "blocks.0", "blocks.1", "blocks.1.attentions.0.qkv")
    hooks = [
        denoiser.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
        for name in names
    ]
    seen["output"] = denoiser(*inputs)
    for hook in hooks:
        hook.remove()
    q, k, _ = seen.pop(names[-1]).unflatten(-1, (3, -1, HEAD)).unbind(2)
    return {**seen, "logits": torch.einsum("bnkd,bmkd->bknm", q, k) / HEAD**0.5}


def growth(optimizer: Any, widths: list[int], mup: bool) -> dict[str, float]:
    """Return the exponent of each change in the width, by least squares on logarithms."""
    rows = [changes_by_training(width, optimizer, mup) for width in widths]
    x = torch.tensor([math.log(width) for width in widths])
    x = x - x.mean()
    return {
        name: float((x * torch.tensor([math.log(row[name]) for row in rows])).sum() / (x @ x))
        for name in rows[0]
    }


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one != "muon")) for one in OPTIMIZERS]
)
def test_activations_keep_their_size_over_widths(name: str) -> None:
    check_growth(OPTIMIZERS[name], [64, 128, 256])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_activations_keep_their_size_up_to_width_1024(name: str) -> None:
    check_growth(OPTIMIZERS[name], [64, 128, 256, 512, 1024])


def check_growth(optimizer: Any, widths: list[int]) -> None:
    with_mup, without = growth(optimizer, widths, True), growth(optimizer, widths, False)
    assert max(map(abs, with_mup.values())) < 0.15, with_mup
    assert max(without.values()) > 0.3, without


def test_rates_follow_the_table() -> None:
    denoiser = network(4 * BASE)
    adam = MaximalUpdate(BASE, partial(AdamW, lr=0.1, weight_decay=0.2)).for_module(denoiser)
    muon = MaximalUpdate(BASE, partial(MuonAdamW, lr=0.1)).for_module(denoiser)
    block = denoiser.blocks[0]
    expected = {  # width 4 times the base's: input, hidden, output, bias
        denoiser.x_in.weight: (1.0, 1.0),
        block.mlp[0].weight: (0.25, 0.5),
        denoiser.final.out.weight: (0.25, 0.25),
        block.mlp[0].bias: (1.0, 1.0),
    }
    groups = parameter_groups(denoiser)
    for column, built in enumerate((adam(groups), muon(groups))):
        rates = {p: g["lr"] / 0.1 for g in built.param_groups for p in g["params"]}
        assert len(rates) == len(list(denoiser.parameters()))
        for parameter, factors in expected.items():
            assert rates[parameter] == pytest.approx(factors[column])
        if column == 0:
            for group in built.param_groups:
                decay = 0.2 if group["is_matrix"] else 0.0
                assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * decay)


def test_at_the_base_width_nothing_changes() -> None:
    torch.manual_seed(0)
    plain = network(BASE, None)
    torch.manual_seed(0)
    ours = network(BASE)
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
    factory = MaximalUpdate(BASE, partial(AdamW, lr=0.1, weight_decay=0.2)).for_module(ours)
    for group in factory(parameter_groups(ours)).param_groups:
        assert group["lr"] == 0.1


@pytest.mark.parametrize(
    ("module", "base_width", "message"),
    [
        (UViT(4, 8, TransformerSize(3, 32, 2)), 64, "scales one DiT, and the model has 0"),
        (network(BASE), 40, "base_width = 40 is not a multiple of the heads' width 16"),
        (network(BASE), 32, "time.base_width = 64: must be MaximalUpdate's base_width = 32"),
        (network(BASE, None), 64, "time.base_width = None: must be"),
    ],
)
def test_what_cannot_be_scaled_is_refused(
    module: torch.nn.Module, base_width: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaximalUpdate(base_width).for_module(module)
