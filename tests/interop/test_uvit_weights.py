"""U-ViT's public weights: the reference's output, and the way back.

The outputs come from baofff/U-ViT at ce55170, by ``python -m tests.interop.record uvit_label`` and
``uvit_text``; its weights were seeded by name.
"""

from __future__ import annotations

import pytest
import torch

from sora_lightning.interop import uvit
from sora_lightning.types import Condition
from tests.interop.golden import Golden


def test_a_label_model_gives_the_references_output():
    golden = Golden.load("uvit_label")
    built = uvit.to_ours(golden.weights, num_heads=2).build()
    x, t, y = (golden.inputs[name] for name in ("x", "t", "y"))
    with torch.no_grad():
        condition = built["conditioner"].of_rows(y)
        ours = built["denoiser"](x[:, :, None], t / 1000, condition)
    torch.testing.assert_close(ours[:, :, 0], golden.output, atol=1e-5, rtol=1e-5)


def test_a_text_model_gives_the_references_output():
    golden = Golden.load("uvit_text")
    denoiser = uvit.to_ours(golden.weights, num_heads=2).build()["denoiser"]
    x, t, context = (golden.inputs[name] for name in ("x", "t", "context"))
    condition = Condition(context, torch.ones(2, 77, dtype=torch.bool), torch.zeros(2, 12))
    with torch.no_grad():
        ours = denoiser(x[:, :, None], t / 1000, condition)
    torch.testing.assert_close(ours[:, :, 0], golden.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["uvit_label", "uvit_text"])
def test_there_and_back_is_the_same_to_the_bit(case):
    weights = Golden.load(case).weights
    back = uvit.to_theirs(uvit.to_ours(weights, num_heads=2))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_leftover_and_missing_weights_are_named():
    weights = Golden.load("uvit_label").weights
    more = {**weights, "in_blocks.0.attn.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no rule takes: in_blocks\.0\.attn\.extra$"):
        uvit.to_ours(more, num_heads=2)
    less = {name: weights[name] for name in weights if name != "decoder_pred.bias"}
    with pytest.raises(ValueError, match=r"missing: decoder_pred\.bias$"):
        uvit.to_ours(less, num_heads=2)
    with pytest.raises(ValueError, match="width 32 is none of the paper's: say num_heads"):
        uvit.to_ours(weights)
    with pytest.raises(ValueError, match="these are not U-ViT's weights"):
        uvit.to_ours({"x_embedder.proj.weight": torch.zeros(1)})
