"""A discriminator in one backward pass: the gradients of two, its closed forms, its refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sora_lightning.tokenizers import Adversarial, ConvTokenizer, PatchDiscriminator3d


def build(**settings):
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(
        latent_channels=4,
        widths=(8, 16),
        down_time=(True,),
        down_space=(True,),
        blocks_per_level=1,
    )
    discriminator = PatchDiscriminator3d((8, 8), spectral=settings.pop("spectral", False))
    return tokenizer, Adversarial(discriminator, **settings)


def reconstruct(tokenizer, video):
    reconstruction = tokenizer.decode_raw(tokenizer.posterior(video).mean)
    return reconstruction, (reconstruction - video).abs().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {"adaptive": False},
        {"adaptive": True},
        {"adaptive": True, "r1": 3.0},
        {"adaptive": True, "spectral": True},
    ],
    ids=str,
)
def test_one_backward_gives_the_gradients_of_two(settings):
    tokenizer, adversarial = build(**settings)
    others = copy.deepcopy((tokenizer, adversarial))
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1

    reconstruction, loss = reconstruct(tokenizer, video)
    more, _ = adversarial(loss, reconstruction, video, tokenizer.last_layer(), step=0)
    (loss + more).backward()

    # The form of VQGAN: the tokenizer's step with a discriminator that does not learn from it,
    # then the discriminator's own.
    tokenizer_2, adversarial_2 = others
    critic = adversarial_2.discriminator
    reconstruction, loss = reconstruct(tokenizer_2, video)
    generator = -critic(reconstruction).mean()
    weight = adversarial_2.weight
    if adversarial_2.adaptive:
        last = tokenizer_2.last_layer()
        norms = [
            torch.autograd.grad(side, last, retain_graph=True)[0].norm()
            for side in (loss, generator)
        ]
        weight = weight * norms[0] / (norms[1] + 1e-4)
    (loss + weight * generator).backward()
    critic.zero_grad()
    real_video = video.clone().requires_grad_()
    real, made = critic(real_video), critic(reconstruction.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
    if adversarial_2.r1:
        slope = torch.autograd.grad(real.sum(), real_video, create_graph=True)[0]
        hinge = hinge + 0.5 * adversarial_2.r1 * slope.square().sum() / len(video)
    hinge.backward()

    for one, two in ((tokenizer, tokenizer_2), (adversarial, adversarial_2)):
        gradients = [
            (p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters(), strict=True)
        ]
        assert any(p is not None and p.abs().max() > 0 for p, _ in gradients)
        for first, second in gradients:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_neither_side_reaches_into_the_other():
    tokenizer, adversarial = build(r1=1.0)
    video = torch.rand(1, 3, 5, 16, 16)
    reconstruction, _ = reconstruct(tokenizer, video)
    adversarial.generator_loss(reconstruction).backward()
    assert all(p.grad is None for p in adversarial.parameters())
    assert any(p.grad is not None for p in tokenizer.parameters())
    tokenizer.zero_grad()
    reconstruction, _ = reconstruct(tokenizer, video)
    adversarial.discriminator_loss(reconstruction, video)[0].backward()
    assert all(p.grad is None for p in tokenizer.parameters())
    assert all(p.grad is not None for p in adversarial.parameters())


class Plane(nn.Module):
    """``slope`` times the sum of a clip's values."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, video):
        return self.slope * video.flatten(1).sum(1)


def test_hinge_and_r1_of_a_plane():
    adversarial = Adversarial(weight=1.0, adaptive=False, r1=4.0)
    adversarial.discriminator = Plane(0.5)
    video, made = torch.full((1, 3, 1, 1, 1), 0.2), torch.full((1, 3, 1, 1, 1), -1.0)
    loss, terms = adversarial.discriminator_loss(made, video)
    hinge = 0.5 * ((1 - 0.5 * 0.6) + max(0, 1 + 0.5 * -3))
    torch.testing.assert_close(terms["discriminator"], torch.tensor(hinge))
    torch.testing.assert_close(terms["r1"], torch.tensor(3 * 0.25))
    torch.testing.assert_close(loss, torch.tensor(hinge + 2 * 3 * 0.25))
    torch.testing.assert_close(adversarial.generator_loss(made), torch.tensor(1.5))


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_in_the_last_layer():
    adversarial = Adversarial(weight=0.5)
    adversarial.discriminator = Plane(2.0)
    last = nn.Parameter(torch.ones(1))
    reconstruction = last * torch.full((1, 3, 1, 1, 1), 0.1)
    loss = 7 * reconstruction.sum()  # slope 7 * 0.3; the plane's is -2 * 0.3
    video = torch.zeros(1, 3, 1, 1, 1)
    more, terms = adversarial(loss, reconstruction, video, last, step=0)
    expected = 0.5 * 2.1 / (0.6 + 1e-4)
    torch.testing.assert_close(terms["adversarial_weight"], torch.tensor(expected))
    discriminator = adversarial.discriminator_loss(reconstruction, video)[0]
    torch.testing.assert_close(more - discriminator, torch.tensor(expected * -0.6))


def test_before_its_start_it_costs_nothing_and_every_weight_has_a_gradient_of_0():
    tokenizer, adversarial = build(start_step=3)
    video = torch.rand(1, 3, 5, 16, 16)
    reconstruction, loss = reconstruct(tokenizer, video)
    more, terms = adversarial(loss, reconstruction, video, tokenizer.last_layer(), step=2)
    assert more == 0
    assert terms == {}
    more.backward()
    assert all(not p.grad.any() for p in adversarial.parameters())
    later, terms = adversarial(loss, reconstruction, video, tokenizer.last_layer(), step=3)
    assert later != 0
    assert set(terms) == {"discriminator", "real", "made", "generator", "adversarial_weight"}


def test_the_spectral_norm_holds_the_largest_singular_value_at_1():
    discriminator = PatchDiscriminator3d((8, 8), spectral=True)
    with torch.no_grad():
        discriminator.layers[0].parametrizations.weight.original *= 50
    for _ in range(30):
        discriminator(torch.rand(1, 3, 1, 8, 8))
    for layer in discriminator.layers[::2]:
        largest = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        torch.testing.assert_close(largest, torch.tensor(1.0), rtol=0.05, atol=0)


def test_an_image_is_a_clip_of_one_frame_and_small_frames_are_refused():
    discriminator = PatchDiscriminator3d((8, 8, 8))
    assert discriminator(torch.rand(2, 3, 1, 16, 24)).shape == (2, 1, 1, 2, 3)
    assert discriminator(torch.rand(2, 3, 17, 16, 24)).shape == (2, 1, 3, 2, 3)
    with pytest.raises(ValueError, match="needs 8 pixels a side"):
        discriminator(torch.rand(1, 3, 1, 4, 16))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1.0}, r"weight = -1\.0"),
        ({"r1": -1.0}, r"r1 = -1\.0"),
        ({"start_step": -1}, "start_step = -1"),
        ({"learning_rate": 0.0}, r"learning_rate = 0\.0"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Adversarial(**settings)
    with pytest.raises(ValueError, match="widths"):
        PatchDiscriminator3d(())
