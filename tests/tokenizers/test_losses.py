"""Reconstruction losses: closed forms, and LPIPS beside torchmetrics' own."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips as reference

from sora_lightning.tokenizers import (
    L1,
    L2,
    Charbonnier,
    L1AndL2,
    Perceptual,
    PerceptualDistance,
    ReconstructionLoss,
    WithEdges,
)
from sora_lightning.tokenizers.posterior import DiagonalGaussian


@pytest.mark.parametrize(
    ("pixel", "cost"),
    [
        (L1(), 0.75),
        (L2(), 0.625),
        (L1AndL2(l1=2.0, l2=3.0), 2 * 0.75 + 3 * 0.625),
        (Charbonnier(0.5), (0.5**0.5 + 1.25**0.5) / 2 - 0.5),
        (WithEdges(L1(), weight=2.0), 0.75 + 2 * 1.5**2),
    ],
)
def test_an_error_costs_its_closed_form(pixel, cost):
    error = torch.tensor([0.5, -1.0]).expand(2, 3, 1, 4, 2)
    torch.testing.assert_close(pixel(error), torch.tensor(cost))
    assert pixel(torch.zeros(1, 3, 1, 2, 2)) == 0


def test_edges_count_alike_along_rows_and_columns_and_in_time_where_asked_for():
    step = torch.zeros(1, 3, 2, 4, 4)
    step[..., 2:] = 1.0
    cost = WithEdges(L1AndL2(0.0, 1.0), weight=3.0)
    torch.testing.assert_close(cost(step), torch.tensor(0.5 + 3 * 1 / 3))
    torch.testing.assert_close(cost(step.mT), cost(step))
    flicker = torch.stack([torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)], 2)
    assert cost(flicker) == 0.5
    steady = WithEdges(L1AndL2(0.0, 1.0), weight=3.0, time=16.0)
    assert steady(flicker) == 0.5 + 16
    assert steady(flicker[:, :, :1]) == 1  # an image has no next frame


def test_charbonnier_is_squared_below_epsilon_and_absolute_above():
    small, large = torch.full((1, 3, 1, 1, 1), 1e-3), torch.full((1, 3, 1, 1, 1), 100.0)
    torch.testing.assert_close(Charbonnier(1.0)(small), torch.tensor(5e-7), rtol=0.05, atol=0)
    torch.testing.assert_close(Charbonnier(1.0)(large), torch.tensor(99.0), rtol=1e-3, atol=0)


def test_loss_is_the_weighted_sum_of_its_terms():
    video = torch.zeros(2, 3, 1, 4, 4)
    posterior = DiagonalGaussian(torch.ones(2, 1, 1, 2, 2), torch.zeros(2, 1, 1, 2, 2))
    total, terms = ReconstructionLoss(L1AndL2(2.0, 3.0), kl=5.0)(video + 0.5, video, posterior)
    assert terms["pixel"] == 2 * 0.5 + 3 * 0.25
    assert terms["kl"] == 4 * 0.5 / 48  # 4 latents of KL 1/2 each over 48 pixel values
    torch.testing.assert_close(total, torch.tensor(2 * 0.5 + 3 * 0.25 + 5 * 2 / 48))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: L1AndL2(0.0, 0.0), "nothing asks for a reconstruction"),
        (lambda: L1AndL2(l1=-1.0), r"l1 = -1\.0: must not be negative"),
        (lambda: WithEdges(weight=-1.0), r"edges: weight = -1\.0"),
        (lambda: WithEdges(time=-1.0), r"edges: time = -1\.0"),
        (lambda: Charbonnier(0.0), r"epsilon = 0\.0"),
        (lambda: ReconstructionLoss(kl=-1.0), r"kl = -1\.0: must not be negative"),
        (lambda: Perceptual(weight=-1.0), r"weight = -1\.0"),
        (lambda: PerceptualDistance("nowhere.pth"), r"nowhere\.pth: no such file"),
    ],
)
def test_wrong_weights_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.fixture(scope="module")
def vgg():
    """VGG-16's convolutions as torchvision numbers them, with drawn weights."""
    torch.manual_seed(0)
    layers, width = [], 3
    for widths in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for wider in widths:
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights(vgg, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    content = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    torch.save({**content, "classifier.0.weight": torch.zeros(1)}, path)
    return path


def test_lpips_is_that_of_torchmetrics_and_has_a_gradient(vgg, weights, monkeypatch):
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_, **__: vgg)
    theirs = reference._LPIPS(pretrained=True, net="vgg")
    video, other = torch.rand(2, 2, 3, 3, 32, 48) * 2 - 1
    expected = [theirs(video[:, :, i], other[:, :, i]).flatten() for i in range(3)]
    ours = PerceptualDistance(weights)
    other.requires_grad_()
    found = ours(other, video)
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert other.grad.abs().max() > 0
    assert not ours(video, video).any()
    assert not any(p.requires_grad for p in ours.parameters())


def test_lpips_takes_part_in_the_loss_and_refuses_another_network(weights, tmp_path):
    video, other = torch.rand(2, 1, 3, 1, 16, 16) * 2 - 1
    posterior = DiagonalGaussian(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2))
    loss = ReconstructionLoss(L2(), perceptual=Perceptual(weights, weight=2.0))
    total, terms = loss(other, video, posterior)
    torch.testing.assert_close(total, terms["pixel"] + 2 * terms["lpips"])
    assert terms["lpips"] > 0
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: is no VGG-16"):
        PerceptualDistance(tmp_path / "other.pth")


@pytest.mark.parametrize("path", [None, Path("nowhere.pth")])
def test_without_weights_lpips_weighs_nothing_and_says_so(path, caplog):
    with caplog.at_level(logging.WARNING):
        perceptual = Perceptual(path, weight=1.0)
    assert "LPIPS has weight 0" in caplog.text
    video = torch.rand(1, 3, 1, 8, 8)
    posterior = DiagonalGaussian(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2))
    total, terms = ReconstructionLoss(L2(), perceptual=perceptual)(video / 2, video, posterior)
    assert terms["lpips_weight"] == terms["lpips"] == 0
    torch.testing.assert_close(total, terms["pixel"])
