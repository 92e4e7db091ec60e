"""Counts on the meta device: fused attention, live memory, parts."""

import pytest
import torch

from sora_lightning.cli.training_cost import (
    activations_of_clip,
    losses_of_zeros,
)
from sora_lightning.conditioning import Unconditional
from sora_lightning.denoisers import DiT, DiTParts
from sora_lightning.denoisers.conditions import NoCondition
from sora_lightning.denoisers.pretrained import configured_denoiser
from sora_lightning.layers.partitions import Alternating, Joint
from sora_lightning.live_memory import LiveMemory, without_gradients
from sora_lightning.planner.counting import _measured, count
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers.ldm import LDMTokenizer
from sora_lightning.types import VideoSize

_DEPTH, _WIDTH = 4, 128


def system(layout):
    with torch.device("meta"):
        return DiffusionSystem(
            LDMTokenizer(),
            Unconditional(),
            lambda channels, width: DiT(
                channels,
                width,
                "tiny",
                (1, 2, 2),
                layout=layout,
                parts=DiTParts(condition=NoCondition),
            ),
        )


def test_live_memory_is_the_peak_of_what_is_still_referred_to():
    x = torch.empty(1000, device="meta")

    def chain():
        a = x + 1
        b = a + 1
        c = b.view(10, 100) + 1  # the view takes no memory
        del a
        return b, c

    assert _measured(chain)[1] == 3 * 4000
    assert _measured(lambda: ((x + 1) + 1) + 1)[1] == 2 * 4000


def test_attention_is_counted_and_keeps_no_matrix_of_scores():
    q = torch.empty(1, 2, 512, 64, device="meta", requires_grad=True)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()

    forward = 2 * 2 * 2 * 512**2 * 64  # two products of 2 heads, two FLOPs a multiply-accumulate
    assert _measured(attend)[0] == forward
    flops, peak = _measured(lambda: torch.autograd.backward(attend()))
    assert flops == 3 * forward
    assert peak < 2 * 512**2 * 4


@pytest.mark.parametrize(("layout", "attended"), [(Joint(), 2048), (Alternating(), (256 + 8) / 2)])
def test_a_layout_costs_its_attended_tokens(layout, attended):
    cost = count(system(layout), VideoSize(8, 256, 256))
    n, d = 2048, _WIDTH
    assert cost.tokens == n
    attention = 4 * n * attended * d * _DEPTH
    assert cost.forward_flops == pytest.approx(24 * n * d**2 * _DEPTH + attention, rel=0.02)
    assert cost.backward_flops == pytest.approx(2 * cost.forward_flops, rel=0.02)


def test_memory_grows_with_tokens_alone_and_checkpointing_saves_it():
    short, long = (count(system(Joint()), VideoSize(f, 256, 256)) for f in (4, 8))
    assert long.activations == pytest.approx(2 * short.activations, rel=0.01)
    inputs = _DEPTH * long.tokens * _WIDTH * 2
    assert long.checkpointed == inputs + long.activations / _DEPTH
    assert long.working_set < long.checkpointed


def test_the_tokenizer_costs_what_kl_f8_costs():
    """136.4 and 311.1 GMAC of kl-f8 at 256 x 256, counted in its public code."""
    cost = count(system(Joint()), VideoSize(1, 256, 256))
    assert cost.encode_flops / 2e9 == pytest.approx(136.4, rel=0.01)
    assert cost.decode_flops / 2e9 == pytest.approx(311.1, rel=0.01)
    assert cost.tokenizer_parameters == 83_653_863


def test_what_a_public_network_recomputes_is_not_counted_twice():
    pytest.importorskip("diffusers")
    from tests.denoisers.pipelines import PARTS

    def counted(checkpointing):
        config = {**PARTS["Wan"][2][1], "_class_name": "WanTransformer3DModel"}
        with torch.device("meta"):
            denoiser = configured_denoiser(config, checkpointing)
            return count(
                DiffusionSystem(LDMTokenizer(), Unconditional(16), denoiser), VideoSize(1, 64, 64)
            )

    with_it, without = counted(True), counted(False)
    assert with_it == without
    assert without.checkpointed < without.activations
    assert without.trained == without.parameters


@pytest.mark.parametrize(("checkpointing", "tolerance"), [(False, 0.05), (True, 0.35)])
def test_activations_of_a_clip_are_those_of_a_real_step(checkpointing, tolerance):
    parts = DiTParts(condition=NoCondition)

    def made():
        denoiser = DiT(4, 128, "S", parts=parts, activation_checkpointing=checkpointing)
        return DiffusionSystem(LDMTokenizer(), Unconditional(), denoiser)

    size = VideoSize(16, 64, 64)
    with torch.device("meta"):
        estimate = activations_of_clip(made(), size)
    system = made()
    with LiveMemory() as memory, without_gradients(system):
        losses_of_zeros(system, size, 1).sum().backward()
    assert estimate == pytest.approx(memory.peak, rel=tolerance)
