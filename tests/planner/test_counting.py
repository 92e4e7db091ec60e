"""Counts on the meta device: fused attention, live memory, parts."""

import re
from pathlib import Path

import pytest
import torch

from sora_lightning.cli.training_cost import (
    activations_of_clip,
    condition_of_zeros,
    losses_of_zeros,
)
from sora_lightning.conditioning import Unconditional
from sora_lightning.denoisers import DiT, DiTParts
from sora_lightning.denoisers.conditions import NoCondition
from sora_lightning.denoisers.lora import add_lora
from sora_lightning.denoisers.pretrained import configured_denoiser
from sora_lightning.diffusers_folders import cast_as_read, read_network
from sora_lightning.layers.partitions import Alternating, Joint
from sora_lightning.live_memory import (
    FLOAT32,
    FLOAT32_RESULT,
    LOWER,
    WIDEST,
    LiveMemory,
    cuda_autocast,
    without_gradients,
)
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

    assert _measured(torch.float32, chain)[1] == 3 * 4000
    assert _measured(torch.float32, lambda: ((x + 1) + 1) + 1)[1] == 2 * 4000


def test_attention_is_counted_and_keeps_no_matrix_of_scores():
    q = torch.empty(1, 2, 512, 64, device="meta", requires_grad=True)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()

    forward = 2 * 2 * 2 * 512**2 * 64  # two products of 2 heads, two FLOPs a multiply-accumulate
    assert _measured(torch.float32, attend)[0] == forward
    flops, peak = _measured(torch.float32, lambda: torch.autograd.backward(attend()))
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
    assert inputs + long.activations / _DEPTH < long.checkpointed < long.activations / 2
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


def _saved_bytes(network, call):
    """Bytes of what autograd keeps for the backward pass, beside the network's weights."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # alive, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    "name", ["Wan", *(pytest.param(one, marks=pytest.mark.slow) for one in ("LTX", "CogVideoX"))]
)
def test_activations_are_what_autograd_saves_under_autocast(name):
    pytest.importorskip("diffusers")
    from peft import LoraConfig

    from tests.denoisers.pipelines import PARTS

    kind, config = PARTS[name][2]
    config = {**config, "_class_name": kind.__name__, "num_layers": 6}
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])

    def made(device):
        with torch.device(device):
            denoiser = configured_denoiser(config)
            cast_as_read(denoiser.network.requires_grad_(False), torch.bfloat16)
            add_lora(denoiser, lora)
            return DiffusionSystem(LDMTokenizer(), Unconditional(16), denoiser)

    size = VideoSize(9, 128, 128)
    planned = count(made("meta"), size)
    denoiser = made("cpu").denoiser
    condition = condition_of_zeros(made("cpu"), 1)
    with cuda_autocast(torch.bfloat16):
        x_t, t = torch.zeros(1, 4, 9, 16, 16), torch.zeros(1)
        saved = _saved_bytes(denoiser, lambda: denoiser(x_t, t, condition))
    assert planned.activations == pytest.approx(saved, rel=0.1)
    pure = made("meta")
    pure.denoiser.to(torch.bfloat16)
    assert count(pure, size, torch.float32).activations < 0.9 * planned.activations


def test_casts_are_those_of_autocast_on_cuda():
    """The lists are in a header that torch installs."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    lists, current = {}, None
    for line in header.read_text().splitlines():
        if found := re.match(r"#define AT_FORALL_(\w+)\(_\)", line):
            current = lists.setdefault(found[1], set())
        elif current is not None and (found := re.match(r"  _\((\w+)", line)):
            current.add(found[1].strip("_"))
        elif not line.endswith("\\"):
            current = None
    assert lists["LOWER_PRECISION_FP"] >= LOWER
    assert lists["FP32"] >= FLOAT32
    assert lists["FP32_SET_OPT_DTYPE"] >= FLOAT32_RESULT
    assert lists["PROMOTE"] >= WIDEST


def test_adapters_on_meta_have_the_types_of_those_that_are_read(tmp_path):
    pytest.importorskip("diffusers")
    from tests.denoisers.pipelines import network

    network("Wan").save_pretrained(tmp_path)
    read = read_network(tmp_path, "WanTransformer3DModel", torch.bfloat16)
    cast = network("Wan")
    cast_as_read(cast, torch.bfloat16)
    types = {name: p.dtype for name, p in cast.named_parameters()}
    assert types == {name: p.dtype for name, p in read.named_parameters()}
    assert set(types.values()) == {torch.float32, torch.bfloat16}


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
