"""Public weights of DiT and its kin, SiT and Latte: the references' outputs, and the way back.

``dit``, ``sit`` and ``latte`` were recorded by ``python -m tests.interop.record`` from
facebookresearch/DiT at ed81ce2, willisma/SiT at 947f95b and Vchitect/Latte at b27c24a with timm
1.0.31; their weights were seeded by name. diffusers' classes run here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sora_lightning.diffusion import DDIM, Epsilon, Process, VariancePreserving, uniform_times
from sora_lightning.interop import dit, dit_diffusers, latte, latte_diffusers, sit
from sora_lightning.types import Condition, TokenGrid
from tests.interop.golden import Golden, seeded

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def diffusers_dit(**changes):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=5,
        attention_bias=True,
        **{"norm_eps": 1e-6, **changes},
    ).eval()
    names = {
        name: name.replace("blocks.1.norm1.emb", "blocks.0.norm1.emb")
        for name in model.state_dict()
    }
    model.load_state_dict(
        {name: seeded(names[name], w.shape) for name, w in model.state_dict().items()}
    )
    return model


def diffusers_latte():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=10,
        video_length=3,
    ).eval()
    model.load_state_dict({name: seeded(name, w.shape) for name, w in model.state_dict().items()})
    return model


@torch.no_grad()
def test_dit_gives_the_references_output():
    golden = Golden.load("dit")
    built = dit.to_ours(golden.weights, num_heads=2).build()
    condition = built["conditioner"].of_rows(golden.inputs["y"])
    x = golden.inputs["x"][:, :, None]
    ours = built["denoiser"](x, (golden.inputs["t"] + 1) / 1000, condition)
    torch.testing.assert_close(ours[:, :, 0], golden.output, **CLOSE)


@torch.no_grad()
def test_sit_gives_the_references_velocity_turned_round():
    golden = Golden.load("sit")
    built = sit.to_ours(golden.weights, num_heads=2).build()
    condition = built["conditioner"].of_rows(golden.inputs["y"])
    x = golden.inputs["x"][:, :, None]
    ours = built["denoiser"](x, 1 - golden.inputs["t"], condition)
    torch.testing.assert_close(-ours[:, :, 0], golden.output, **CLOSE)


@torch.no_grad()
def test_latte_gives_the_references_output():
    golden = Golden.load("latte")
    built = latte.to_ours(golden.weights, num_heads=2).build()
    condition = built["conditioner"].of_rows(golden.inputs["y"])
    x = golden.inputs["x"].transpose(1, 2)
    ours = built["denoiser"](x, (golden.inputs["t"] + 1) / 1000, condition)
    torch.testing.assert_close(ours.transpose(1, 2), golden.output, **CLOSE)


@torch.no_grad()
def test_diffusers_dit_gives_its_output():
    """At step 0 as it is; at any step where its frequencies of time are the public code's."""
    model = diffusers_dit()
    built = dit_diffusers.to_ours(model.state_dict(), num_heads=2).build()
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 5, 3])
    condition = built["conditioner"].of_rows(y)

    def both(steps):
        ours = built["denoiser"](x[:, :, None], (steps + 1) / 1000, condition)[:, :, 0]
        return ours, model(x, steps, y).sample

    torch.testing.assert_close(*both(torch.zeros(3)), **CLOSE)
    steps = torch.tensor([1, 500, 999])
    ours, theirs = both(steps)
    assert not torch.allclose(ours, theirs, atol=1e-3)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(*both(steps), **CLOSE)


@torch.no_grad()
def test_a_converted_dit_samples_as_the_public_one_does():
    """DDIM of diffusers' model at its own steps 0 to 999, and of ours on the discrete path."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the public code's frequencies
    built = dit_diffusers.to_ours(model.state_dict(), num_heads=2).build()
    x, y, num_steps = torch.randn(2, 4, 8, 8), torch.tensor([0, 3]), 10
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(num_steps)
    sample = x
    for step in scheduler.timesteps:
        noise = model(sample, step.expand(2), y).sample[:, :4]
        sample = scheduler.step(noise, step, sample, eta=0.0).prev_sample
    ours = DDIM()(
        built["denoiser"],
        x[:, :, None],
        uniform_times(num_steps).double(),
        built["conditioner"].of_rows(y),
        Process(VariancePreserving(), Epsilon()),
        torch.zeros_like,
    )
    torch.testing.assert_close(ours[:, :, 0], sample, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_diffusers_latte_gives_its_output():
    model = diffusers_latte()
    denoiser = latte_diffusers.to_ours(model.state_dict(), num_heads=2).build()["denoiser"]
    x, steps, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([7, 990]), torch.randn(2, 6, 10)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    # The reference repeats its states for each frame but not the mask: give it frame by frame.
    frames = mask.repeat_interleave(3, dim=0)
    expected = model(x, steps, text, encoder_attention_mask=frames).sample
    ours = denoiser(x, (steps + 1) / 1000, Condition(text, mask, torch.zeros(2, 10)))
    torch.testing.assert_close(ours, expected, **CLOSE)


CASES = {
    "dit": (dit, lambda: Golden.load("dit").weights),
    "latte": (latte, lambda: Golden.load("latte").weights),
    "dit-diffusers": (dit_diffusers, lambda: diffusers_dit().state_dict()),
    "latte-diffusers": (latte_diffusers, lambda: diffusers_latte().state_dict()),
    "sit": (sit, lambda: Golden.load("sit").weights),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same(case):
    """To the bit, but for tables of positions, which are made again, and SiT's turned time."""
    family, weights = CASES[case][0], CASES[case][1]()
    back = family.to_theirs(family.to_ours(weights, num_heads=2))
    assert back.keys() == weights.keys()
    for name in weights:
        remade = name.endswith("_embed") or (case == "sit" and name == "t_embedder.mlp.0.weight")
        tolerance = 1e-6 if remade else 0
        torch.testing.assert_close(back[name], weights[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_leftover_and_missing_weights_are_named(case):
    family, weights = CASES[case][0], dict(CASES[case][1]())
    more = {**weights, "blocks.0.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no rule takes: blocks\.0\.extra$"):
        family.to_ours(more, num_heads=2)
    name = next(name for name in weights if "attn" in name and name.endswith("bias"))
    del weights[name]
    with pytest.raises(ValueError, match=f"missing: {name}$"):
        family.to_ours(weights, num_heads=2)


def test_one_family_becomes_another_and_no_network_passes_for_one_that_it_is_not():
    weights = Golden.load("dit").weights
    ours = dit.to_ours(weights, num_heads=2)
    again = dit_diffusers.to_ours(dit_diffusers.to_theirs(ours), num_heads=2)
    assert again.parts == ours.parts
    assert all(torch.equal(again.weights[name], ours.weights[name]) for name in ours.weights)
    with pytest.raises(ValueError, match="say for which grid of tokens"):
        dit.to_theirs(again)
    assert ours.grid == TokenGrid(1, 4, 4)
    for family in (sit, latte, latte_diffusers):
        with pytest.raises(ValueError, match=r"parts\.time|layout"):
            family.to_theirs(ours)
    with pytest.raises(ValueError, match=r"parts\.time"):
        dit.to_theirs(sit.to_ours(Golden.load("sit").weights, num_heads=2))
    with pytest.raises(ValueError, match="the public network has none such"):
        dit.to_theirs(latte.to_ours(Golden.load("latte").weights, num_heads=2))


def test_what_is_not_the_public_network_is_refused():
    weights = Golden.load("dit").weights
    moved = {**weights, "pos_embed": weights["pos_embed"] + 0.1}
    with pytest.raises(ValueError, match="pos_embed is not the fixed table"):
        dit.to_ours(moved, num_heads=2)
    with pytest.raises(ValueError, match="width 24 is none of the paper's"):
        dit.to_ours(weights)
    different = dict(diffusers_dit().state_dict())
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    different[name] = different[name] + 1
    with pytest.raises(ValueError, match=r"timestep_embedder\.linear_1 is not the same in every"):
        dit_diffusers.to_ours(different, num_heads=2)
    for family in (dit, sit, latte, dit_diffusers, latte_diffusers):
        with pytest.raises(ValueError, match="these are not"):
            family.to_ours({"conv.weight": torch.zeros(1)})


def test_turning_time_round_is_its_own_inverse():
    weight = torch.randn(5, 256)
    torch.testing.assert_close(sit.turn_time(*sit.turn_time(weight))[0], weight, **CLOSE)


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no encoder in it; there is denoiser"):
        dit.to_ours(Golden.load("dit").weights, num_heads=2).init_args("encoder")
    assert isinstance(dit.to_ours(Golden.load("dit").weights, 2).build()["denoiser"], nn.Module)
