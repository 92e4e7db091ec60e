"""Estimates against public figures, each with its source and tolerance."""

from dataclasses import replace

import pytest
import torch

from sora_lightning.conditioning import Unconditional
from sora_lightning.denoisers import image_dit
from sora_lightning.denoisers.uvit import UVIT_SIZES, LearnedExtent, UViT
from sora_lightning.layers.patch import Patch
from sora_lightning.planner import DEVICES, Count, Parallelism, Workload, count, estimate
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers.ldm import LDMTokenizer
from sora_lightning.types import Compression, TokenGrid, VideoSize

_BARE = {"checkpointing": False, "ema": False}


def dit_xl(size):
    with torch.device("meta"):
        system = DiffusionSystem(
            LDMTokenizer(), Unconditional(1152), lambda c, w: image_dit(c, w, "XL", 2)
        )
    return count(system, size)


# side, steps, FLOPs: arXiv 2212.09748, twice its forward "Gflops" x batch 256 x steps x 3
@pytest.mark.parametrize(
    ("side", "steps", "flops"),
    [
        (256, 7_000_000, 1.276e21),
        pytest.param(512, 3_000_000, 2.417e21, marks=pytest.mark.slow),
    ],
)
def test_training_dit_xl_costs_what_its_paper_states(side, steps, flops):
    work = Workload(batch=1, steps=steps, utilisation=1.0, **_BARE)
    plan = estimate(dit_xl(VideoSize(1, side, side)), DEVICES["A100"], Parallelism(gpus=256), work)
    assert plan.training_flops == pytest.approx(flops, rel=0.005)
    assert plan.training_hours / 24 == pytest.approx(flops / 312e12 / 86400, rel=0.005)
    assert plan.steps_per_second == pytest.approx(256 * 312e12 / (flops / steps), rel=0.005)


def test_u_vit_h_needs_what_its_repository_states():
    """U-ViT-H/2 at batch 128 on one A100: 0.97 steps/s, 54.3 GB with memory-efficient attention,
    github.com/baofff/U-ViT. 273 tokens here, since 16 of the condition are counted; there 258.
    """
    with torch.device("meta"):
        extent = LearnedExtent(condition=16)
        system = DiffusionSystem(
            LDMTokenizer(),
            Unconditional(1152),
            lambda c, w: UViT(c, w, UVIT_SIZES["H"], (1, 2, 2), extent, smooth=False),
        )
    work = Workload(batch=128, checkpointing=False)
    plan = estimate(
        count(system, VideoSize(1, 256, 256)), DEVICES["A100"], Parallelism(gpus=1), work
    )
    # At that speed these are 99 TFLOP/s.
    assert plan.step_flops == pytest.approx(99e12 / 0.97 * 273 / 258, rel=0.02)
    assert plan.state_memory + plan.activation_memory == pytest.approx(54.3e9, rel=0.1)


def of_flops(forward, parameters=1, tokens=1):
    """A count of given FLOPs, for models that are published by their formula alone."""
    return Count(
        tokens, parameters, parameters, 0, 0, 0.0, 0.0, forward, 2 * forward, 0.0, 1.0, 1.0
    )


def test_open_sora_2_cost_the_published_sum():
    """4160 GPU-days at 2 dollars an hour are 199.68 thousand dollars, arXiv 2503.09642."""
    device = DEVICES["H200"]
    forward = 4160 * 24 * 3600 * device.bf16_flops * 0.3 / 3
    work = Workload(steps=1, utilisation=0.3, price=2.0, **_BARE)
    plan = estimate(of_flops(forward), device, Parallelism(gpus=1), work)
    assert plan.training_price == pytest.approx(199_680, rel=1e-6)


def test_llama_2_70b_took_the_published_hours():
    """1,720,320 A100-hours for 2 T tokens, arXiv 2307.09288, table 2: 43.5 % by 6ND."""
    work = Workload(steps=1, utilisation=0.435, **_BARE)
    plan = estimate(of_flops(2 * 70e9 * 2e12), DEVICES["A100"], Parallelism(gpus=1), work)
    assert plan.training_hours == pytest.approx(1_720_320, rel=0.01)


# public system, frames, height, width, pixels of a token, tokens
@pytest.mark.parametrize(
    ("size", "compression", "tokens"),
    [
        (VideoSize(129, 720, 1280), Compression(4, 8, 8), 118_800),  # HunyuanVideo
        (VideoSize(81, 720, 1280), Compression(4, 8, 8), 75_600),  # Wan 2.1
        (VideoSize(49, 480, 720), Compression(4, 8, 8), 17_550),  # CogVideoX
    ],
)
def test_tokens_of_public_systems(size, compression, tokens):
    grid = compression.grid(size)
    assert Patch(1, 2, 2).grid(grid.f, grid.h, grid.w).num_tokens == tokens


def test_movie_gen_counts_a_clip_without_a_first_frame():
    """256 frames of 768 x 768 at 8 x 8 x 8 with patch 2, arXiv 2410.13720: 73,728 tokens."""
    assert Patch(1, 2, 2).grid(256 // 8, 768 // 8, 768 // 8) == TokenGrid(32, 48, 48)
    assert TokenGrid(32, 48, 48).num_tokens == 73_728


def test_states_are_divided_by_fsdp2_and_not_by_ddp():
    """34 billion parameters are 544 GB of training states without an average: 7 GPUs of 80 GB."""
    count = of_flops(1.0, parameters=34_000_000_000)
    work = Workload(**_BARE)
    sharded = estimate(count, DEVICES["A100"], Parallelism(gpus=7), work)
    whole = estimate(count, DEVICES["A100"], Parallelism(gpus=7, sharded=False), work)
    assert whole.state_memory == 544e9
    assert sharded.state_memory == pytest.approx(544e9 / 7)
    assert sharded.fits
    assert not whole.fits
    assert (sharded.fewest_gpus, whole.largest_batch) == (7, 0)


def test_frozen_weights_have_no_states():
    """A LoRA of 1 % of 10 billion parameters: 20 bytes each for what trains, 2 for the rest."""
    cost = replace(of_flops(1.0, parameters=10**10), trained=10**8)
    plan = estimate(cost, DEVICES["A100"], Parallelism(gpus=1), Workload())
    assert plan.state_memory == 20e8 + 2 * 99e8


def test_the_inverse_fits_and_one_more_does_not():
    count = Count(1000, 10**9, 10**9, 0, 0, 0.0, 0.0, 1.0, 2.0, 0.0, 9e9, 3e9)
    device, parallelism = DEVICES["A100"], Parallelism(gpus=8, context=2)
    batch = estimate(count, device, parallelism, Workload()).largest_batch
    assert estimate(count, device, parallelism, Workload(batch=batch)).fits
    assert not estimate(count, device, parallelism, Workload(batch=batch + 1)).fits


def test_parallelism_that_does_not_divide_the_gpus_is_refused():
    with pytest.raises(ValueError, match="gpus = 8 is not a multiple of tensor x context = 3 x 1"):
        Parallelism(gpus=8, tensor=3)
