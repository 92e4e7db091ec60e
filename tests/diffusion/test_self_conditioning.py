"""A network's own estimate: of the last step in sampling, of a first call in training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from sora_lightning.ablations.clip_losses import clip_losses
from sora_lightning.conditioning import KnownFrames, TextConditioner
from sora_lightning.denoisers import DiT, FeatureCaching
from sora_lightning.diffusion import (
    Known,
    Process,
    SelfConditioned,
    SquaredError,
    V,
    VarianceExploding,
    VariancePreserving,
    with_own_estimate,
)
from sora_lightning.diffusion.predictions import Preconditioned, Velocity
from sora_lightning.diffusion.self_conditioning import estimate_x_0
from sora_lightning.generation import GuidanceConfig, SamplingConfig
from sora_lightning.generation.generator import InitLatents, WeakModel
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem, diffusion
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.systems.time_bins import LossPerTime, fixed_draws
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import Condition, PackedLatents, TokenGrid, VideoBatch

FLOW = Process()


def setting():
    dit = DiT(4, 8, size=TransformerSize(1, 24, 2), self_conditioning=True)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    cond = Condition(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8))
    return dit, torch.randn(2, 4, 1, 4, 4), torch.rand(2), cond


def estimated(output, x, t):
    return x - t.reshape(-1, 1, 1, 1, 1) * output


def test_each_step_of_a_sampling_run_sees_the_last_ones_estimate():
    dit, x, _, cond = setting()
    remembering = SelfConditioned(dit, FLOW, dit.patch)
    t, s = torch.full((2,), 0.9), torch.full((2,), 0.6)
    first, second = remembering(x, t, cond), remembering(x, s, cond)
    torch.testing.assert_close(first, dit(x, t, cond))
    torch.testing.assert_close(second, dit(x, s, cond, estimated(first, x, t)))
    assert not torch.allclose(second, dit(x, s, cond))


def test_two_calls_at_one_step_remember_apart_and_guidance_may_begin_and_end():
    dit, x, _, cond = setting()
    t, s = torch.full((2,), 0.9), torch.full((2,), 0.6)
    other = Condition(cond.tokens + 1, cond.mask, cond.pooled - 1)
    remembering = SelfConditioned(dit, FLOW, dit.patch)
    first, beside = remembering(x, t, cond), remembering(x, t, other)
    torch.testing.assert_close(remembering(x, s, cond), dit(x, s, cond, estimated(first, x, t)))
    torch.testing.assert_close(remembering(x, s, other), dit(x, s, other, estimated(beside, x, t)))
    growing = SelfConditioned(dit, FLOW, dit.patch)
    growing(x, t, cond)
    both = growing(torch.cat([x, x]), torch.cat([s, s]), Condition.cat(cond, other))
    seen = estimated(first, x, t)
    torch.testing.assert_close(both[:2], dit(x, s, cond, seen), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[2:], dit(x, s, other, seen), atol=1e-4, rtol=1e-4)


def test_chosen_clips_train_on_their_estimate_and_others_on_zeros():
    dit, x, t, cond = setting()
    plain = dit(x, t, cond)
    refined = dit(x, t, cond, estimated(plain, x, t).detach())
    chosen = torch.tensor([True, False])
    given = with_own_estimate(dit, FLOW, dit.patch, chosen)(x, t, cond)
    torch.testing.assert_close(given, torch.stack([refined[0], plain[1]]))
    wanted = torch.autograd.grad(refined[0].sum() + plain[1].sum(), list(dit.parameters()))
    for one, other in zip(
        torch.autograd.grad(given.sum(), list(dit.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_pack_sees_the_estimates_that_its_clips_see_alone_with_known_tokens_too():
    dit, x, t, cond = setting()
    mask = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :, :2] = True
    noise, chosen = torch.randn_like(x), torch.tensor([True, False])
    objective = SquaredError()
    network = with_own_estimate(dit, FLOW, dit.patch, chosen)
    for known in (None, Known.of(mask, dit.patch)):
        groups = None if known is None else [Known.of(m[None], dit.patch) for m in mask]
        dense = objective(network, x, noise, t, cond, None if known is None else [known])
        pack, e = PackedLatents(tuple(x)), PackedLatents(tuple(noise))
        packed = objective(network, pack, e, t, cond, groups)
        torch.testing.assert_close(packed, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "process",
    [
        Process(),
        Process(VariancePreserving(), V()),
        Process(VariancePreserving(), Velocity()),
        Process(VarianceExploding(), Preconditioned(0.5)),
    ],
    ids=str,
)
def test_the_estimate_of_a_perfect_output_is_the_data(process):
    x_0, noise = torch.randn(2, 3, 4, 1, 4, 4, dtype=torch.float64)[:, :2]
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    patch = Patch(1, 2, 2)
    inputs = process.inputs(process.path.perturb(x_0, noise, t), t)
    output = process.target(x_0, noise, t)
    torch.testing.assert_close(estimate_x_0(process, patch, output, inputs, t), x_0)
    # Known tokens are at time 0, and their output is arbitrary.
    mask = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :, :2] = True
    known = Known.of(mask, patch)
    inputs, times = known.insert(process, inputs, t, x_0, noise)
    output = torch.where(known.mask, 100.0, output)
    torch.testing.assert_close(estimate_x_0(process, patch, output, inputs, times), x_0)


def test_autocast_keeps_the_gradients_after_the_first_call():
    dit, x, t, cond = setting()
    network = with_own_estimate(dit, FLOW, dit.patch, torch.tensor([True, True]))
    with torch.autocast("cpu", torch.bfloat16):
        network(x, t, cond).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in dit.blocks.parameters())


def system(share: float, **arguments) -> DiffusionSystem:
    torch.manual_seed(0)
    one = DiffusionSystem(
        ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1),
        TextConditioner(width=16, depth=1, num_heads=2),
        lambda c, d: DiT(c, d, TransformerSize(3, 24, 2), patch=(1, 1, 1), **arguments),
        objective=SquaredError(self_conditioning=share),
    )
    for parameter in one.parameters():
        parameter.data.normal_(std=0.1)
    return one.eval()


def test_a_system_feeds_estimates_back_in_training_and_in_sampling():
    torch.manual_seed(0)
    batch = VideoBatch(["x"] * 4, 8.0, ["a"] * 4, latents=torch.randn(4, 4, 3, 2, 2))

    def losses(one: DiffusionSystem) -> torch.Tensor:
        return one.losses(batch, GroupDraws([torch.Generator().manual_seed(0)], 4))

    one = system(0.5, self_conditioning=True)
    mixed = losses(one)
    one.objective = SquaredError(self_conditioning=1.0)
    always = losses(one)
    one.objective = SquaredError()
    never = losses(one)
    fed = (mixed - never).abs() > 1e-6
    assert 0 < fed.sum() < 4
    torch.testing.assert_close(mixed, torch.where(fed, always, never), atol=1e-5, rtol=1e-5)
    grid, prompts, seeds = TokenGrid(3, 2, 2), ["a red circle", "blue"], [0, 1]
    guided = GuidanceConfig(scale=3.0, interval=(0.3, 0.7))
    latents = torch.randn(2, 4, 3, 2, 2)
    mask = torch.zeros(2, 1, 3, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    for config in (
        SamplingConfig(num_steps=4),
        SamplingConfig(num_steps=4, guidance=guided),
        SamplingConfig(num_steps=4, sampler="heun"),
        SamplingConfig(num_steps=4, cache=FeatureCaching(2)),
    ):
        generator = one.video_generator(config)
        with torch.no_grad():
            fed_back = generator.latents(prompts, grid, seeds, KnownFrames(latents, mask))
            one.denoiser.self_conditioning, widths = False, one.denoiser.x_in.weight
            one.denoiser.x_in.weight = torch.nn.Parameter(widths[:, :4].clone())
            plain = generator.latents(prompts, grid, seeds, KnownFrames(latents, mask))
            one.denoiser.self_conditioning, one.denoiser.x_in.weight = True, widths
        assert torch.isfinite(fed_back).all()
        assert (fed_back - plain).abs().max() > 1e-3
        torch.testing.assert_close(fed_back[:, :, 0], latents[:, :, 0])


@torch.no_grad()
def test_an_edit_feeds_each_prompt_its_own_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one, calls = system(0.5, self_conditioning=True), []
    forward = one.denoiser.forward

    def recorded(x_t, t, condition, estimate=None):
        output = forward(x_t, t, condition, estimate)
        calls.append((x_t, t, estimate, output))
        return output

    monkeypatch.setattr(one.denoiser, "forward", recorded)
    generator = one.video_generator(SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=3.0)))
    init = InitLatents(torch.randn(2, 4, 3, 2, 2), 1.0)
    generator.edited(["a red circle"] * 2, ["a blue square"] * 2, [0, 1], init, 2.0)
    assert len(calls) == 2 * 4  # source and target, with and without the prompt in one batch
    for branch in (calls[::2], calls[1::2]):
        assert branch[0][2] is None
        for (x_t, t, _, output), (_, _, estimate, _) in itertools.pairwise(branch):
            expected = estimate_x_0(Process(), one.denoiser.patch, output, x_t, t)
            torch.testing.assert_close(estimate, expected)


@torch.no_grad()
def test_a_weak_model_sees_its_own_estimates() -> None:
    one = system(0.5, self_conditioning=True)
    weak = WeakModel(one.conditioner, one.denoiser)
    arguments = ["a red circle", "blue"], TokenGrid(3, 2, 2), [0, 1]
    alone = one.video_generator(SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=1.0)))
    guided = one.video_generator(SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=3.0)))
    by_itself = replace(guided, weak_model=weak).latents(*arguments)
    # Away from itself is nowhere.
    torch.testing.assert_close(by_itself, alone.latents(*arguments), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_validation_measures_the_denoiser_that_sampling_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        diffusion, "batch_rng", lambda *_: torch.Generator().manual_seed(0)
    )  # which asks the trainer for its rank
    batch = VideoBatch(["x"] * 4, 8.0, ["a", "b", "c", "d"], latents=torch.randn(4, 4, 3, 2, 2))
    one, logged = system(0.5, self_conditioning=True), {}
    one.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]

    def measured(share: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        one.objective, one.loss_per_time = SquaredError(self_conditioning=share), LossPerTime()
        one.validation_step(batch, 0)
        return clip_losses(one, batch, 2), logged["val/loss"], one.loss_per_time.compute()

    half, always, never = measured(0.5), measured(1.0), measured(0.0)
    torch.testing.assert_close(half, always)  # the share is that of training alone
    assert (half[0] - never[0]).abs().min() > 1e-6
    assert (half[1] - never[1]).abs() > 1e-6
    x_0, condition = batch.latents, one.conditioner(batch.captions)
    t, noise = fixed_draws(batch.clip_ids, x_0, one.seed)
    part = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - part) * x_0 + part * noise
    estimate = x_t - part * one.denoiser(x_t, t, condition)
    by_hand = one.denoiser(x_t, t, condition, estimate) - (noise - x_0)
    one.objective = SquaredError(self_conditioning=0.5)
    losses = one.objective(one.network(), x_0, noise, t, condition)
    torch.testing.assert_close(losses, by_hand.square().mean((1, 2, 3, 4)), atol=1e-5, rtol=1e-5)


def test_a_share_without_channels_and_channels_without_a_share_are_refused():
    for share, channels in ((0.5, False), (0.0, True)):
        with pytest.raises(ValueError, match=r"objective\.self_conditioning = .*: set both"):
            system(share, self_conditioning=channels)
    with pytest.raises(ValueError, match=r"self_conditioning = 1\.5"):
        SquaredError(self_conditioning=1.5)
