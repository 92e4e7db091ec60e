"""Adapters of a public network: they alone train, are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_lightning.denoisers import pretrained_denoiser
from sora_lightning.denoisers.lora import merge_adapters
from sora_lightning.types import Condition
from tests.denoisers.pipelines import network

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_out.0"]
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 8},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"attn2.to_q": 32}},
    "rank_stabilised": {"use_rslora": True},
}


def _lora(**arguments: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=TARGETS, **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network("Wan").save_pretrained(tmp_path)
    return tmp_path


def _predict(denoiser: torch.nn.Module) -> Tensor:
    torch.manual_seed(1)
    tokens = torch.randn(1, 3, 16)
    condition = Condition(tokens, torch.ones(1, 3).bool(), tokens.mean(1))
    return denoiser(torch.randn(1, 4, 1, 4, 4), torch.tensor([0.5]), condition)


def _draw_adapters(denoiser: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def test_adapters_alone_train_and_are_saved(folder: Path) -> None:
    plain, ours = pretrained_denoiser(folder), pretrained_denoiser(folder, lora=LORA)
    torch.testing.assert_close(_predict(ours), _predict(plain), rtol=0, atol=0)  # B starts at 0
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {key for key in ours.state_dict() if key != "digest"}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert len(trained) == 2 * 2 * 2 * 2  # A and B of two layers of two attentions of two blocks
    _predict(ours).sum().backward()
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in trained)
    _draw_adapters(ours)
    again = pretrained_denoiser(folder, lora=LORA)
    again.load_state_dict(ours.state_dict())
    assert (_predict(again) - _predict(plain)).abs().max() > 1e-3
    torch.testing.assert_close(_predict(again), _predict(ours))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_adapters_of_each_kind_are_the_unmerged(kind: str, folder: Path) -> None:
    plain = pretrained_denoiser(folder)
    ours = pretrained_denoiser(folder, lora=_lora(**KINDS[kind]))
    torch.testing.assert_close(_predict(ours), _predict(plain), atol=1e-6, rtol=0)
    _draw_adapters(ours)
    again = pretrained_denoiser(folder, lora=_lora(**KINDS[kind]))
    again.load_state_dict(ours.state_dict())
    expected = _predict(ours)
    assert (expected - _predict(plain)).abs().max() > 1e-3
    torch.testing.assert_close(_predict(again), expected, rtol=0, atol=0)
    merge_adapters(again.network)
    assert {name for name, _ in again.network.named_parameters()} == {
        name for name, _ in plain.network.named_parameters()
    }
    torch.testing.assert_close(_predict(again), expected, atol=1e-5, rtol=1e-5)


def test_rank_and_scale_are_those_of_each_layers_pattern(folder: Path) -> None:
    ours = pretrained_denoiser(folder, lora=_lora(**KINDS["ranks"]))
    for block in ours.network.blocks:
        for attention, rank, scaling in ((block.attn1, 4, 2.0), (block.attn2, 2, 16.0)):
            assert attention.to_q.lora_A["default"].weight.shape[0] == rank
            assert attention.to_q.scaling == {"default": scaling}
        assert block.attn2.to_out[0].lora_A["default"].weight.shape[0] == 4


def test_doras_magnitudes_are_exact_beside_bfloat16(folder: Path) -> None:
    """An adapter that has not trained changes nothing."""
    lora = _lora(use_dora=True)
    ours = pretrained_denoiser(folder, lora=lora, dtype="bfloat16")
    for block in ours.network.blocks:
        layer = block.attn1.to_q
        norms = layer.base_layer.weight.float().norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, norms)


def test_adapters_of_other_weights_are_refused(folder: Path) -> None:
    state = pretrained_denoiser(folder, lora=LORA).state_dict()
    missing = {k: v for k, v in state.items() if "blocks.0.attn1.to_q" not in k}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*blocks\.0\.attn1\.to_q\.lora_A"):
        pretrained_denoiser(folder, lora=LORA).load_state_dict(missing)
    changed = network("Wan")
    with torch.no_grad():
        changed.proj_out.bias[0] += 1
    changed.save_pretrained(folder)
    with pytest.raises(ValueError, match="trained on other weights than those of the denoiser's"):
        pretrained_denoiser(folder, lora=LORA).load_state_dict(state)


def test_other_parts_of_a_system_are_still_expected_in_full(folder: Path) -> None:
    parts = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    parts["denoiser"] = pretrained_denoiser(folder, lora=LORA)
    state = parts.state_dict()
    assert {key.partition(".")[0] for key in state} == {"a", "denoiser"}
    assert not [key for key in state if "denoiser" in key and "lora_" not in key][1:]  # the digest
    parts.eval().requires_grad_(False).load_state_dict(state)
    assert parts.state_dict().keys() == state.keys()
    del state["a.weight"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*a\.weight"):
        parts.load_state_dict(state)


def test_frozen_weights_in_bfloat16_and_adapters_in_float32(folder: Path) -> None:
    denoiser = pretrained_denoiser(folder, lora=LORA, dtype="bfloat16")
    dtypes = {p.requires_grad: p.dtype for n, p in denoiser.named_parameters() if "to_q" in n}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    output = _predict(denoiser)
    assert output.dtype == torch.float32
    exact = _predict(pretrained_denoiser(folder))
    assert (output - exact).abs().max() < 0.05 * exact.abs().max()
    output.sum().backward()


def test_recomputed_blocks_have_equal_gradients(folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        denoiser = pretrained_denoiser(folder, lora=LORA, activation_checkpointing=recompute)
        _draw_adapters(denoiser)
        _predict(denoiser).square().sum().backward()
        gradients.append([p.grad for p in denoiser.parameters() if p.requires_grad])
    assert len(gradients[0]) == 16
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "query"], "no layer ends with 'query'; .* end with .*to_k, .*to_q"),
        (None, r"lora\.target_modules is missing: name layers, such as to_q and to_v"),
        ("query.*", "lora: "),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(
    targets: list[str] | str | None, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained_denoiser(folder, lora=peft.LoraConfig(target_modules=targets))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_pattern": {"to_k": 2}}, r"rank_pattern: no layer with an adapter .*'to_k'"),
        ({"alpha_pattern": {"attn3.to_q": 2}}, r"alpha_pattern: .* 'attn3\.to_q'; .*attn1\.to_q"),
        ({"bias": "lora_only"}, "bias = 'lora_only': must be 'none': adapters alone train"),
        ({"modules_to_save": ["proj_out"]}, r"modules_to_save = \['proj_out'\]: must be None"),
    ],
)
def test_what_would_be_ignored_or_is_no_adapter_is_refused(
    arguments: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=rf"lora\.{message}"):
        pretrained_denoiser(folder, lora=_lora(**arguments))
