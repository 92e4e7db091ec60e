import torch

from sora_lightning.denoisers import DiT
from sora_lightning.denoisers.self_conditioning import SelfConditioned, with_own_estimate
from sora_lightning.diffusion.paths import data_from_velocity
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition


def setting():
    dit = DiT(4, 8, size=TransformerSize(1, 24, 2), self_conditioning=True)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    told = Condition(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8))
    return dit, torch.randn(2, 4, 1, 4, 4), torch.rand(2), told


def test_each_call_of_a_sampling_run_sees_the_last_ones_estimate():
    dit, x, t, told = setting()
    remembering = SelfConditioned(dit, data_from_velocity)
    first, second = remembering(x, t, told), remembering(x, t, told)
    torch.testing.assert_close(first, dit(x, t, told))
    estimate = data_from_velocity(x, first, t)
    torch.testing.assert_close(second, dit(x, t, told, estimate))
    assert not torch.allclose(first, second)


def test_chosen_clips_train_on_their_estimate_and_others_on_zeros():
    dit, x, t, told = setting()
    plain = dit(x, t, told)
    refined = dit(x, t, told, data_from_velocity(x, plain, t).detach())
    given = with_own_estimate(dit, data_from_velocity, torch.tensor([True, False]))(x, t, told)
    torch.testing.assert_close(given, torch.stack([refined[0], plain[1]]))
    wanted = torch.autograd.grad(refined[0].sum() + plain[1].sum(), list(dit.parameters()))
    for one, other in zip(
        torch.autograd.grad(given.sum(), list(dit.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
