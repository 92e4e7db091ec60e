"""ViViT's public weights: the output of transformers' own class, and the way back."""

from __future__ import annotations

import pytest
import torch

from sora_lightning.interop import vivit
from tests.interop.golden import seeded

transformers = pytest.importorskip("transformers")


def reference(name="VivitModel", **changes):
    settings = {"image_size": 12, "num_frames": 4, "tubelet_size": [2, 4, 4]} | changes
    config = transformers.VivitConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=5,
        **settings,
    )
    model = getattr(transformers, name)(config).eval()
    model.load_state_dict({n: seeded(n, w.shape) for n, w in model.state_dict().items()})
    return model


@torch.no_grad()
def test_the_encoder_gives_the_references_output():
    model = reference()
    built = vivit.to_ours(model.state_dict(), num_heads=2).build()
    video = torch.randn(2, 3, 4, 12, 12)
    expected = model(video.transpose(1, 2))
    ours = built["encoder"](video)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours.tokens, expected.last_hidden_state[:, 1:], **close)
    pooled = built["pooler"](ours.pooled).tanh()
    torch.testing.assert_close(pooled, expected.pooler_output, **close)


@torch.no_grad()
def test_the_classifier_gives_the_references_logits():
    model = reference("VivitForVideoClassification")
    built = vivit.to_ours(model.state_dict(), num_heads=2).build()
    video = torch.randn(2, 3, 4, 12, 12)
    logits = built["classifier"](built["encoder"](video).pooled)
    expected = model(video.transpose(1, 2)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["VivitModel", "VivitForVideoClassification"])
def test_there_and_back_is_the_same_to_the_bit(name):
    weights = reference(name).state_dict()
    back = vivit.to_theirs(vivit.to_ours(weights, num_heads=2))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_names_of_the_files_published_before_transformers_5():
    weights = reference().state_dict()
    renames = {
        "layers.": "encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    old = {}
    for name, tensor in weights.items():
        for new, before in renames.items():
            name = name.replace(new, before)
        old[name] = tensor
    first, second = (vivit.to_ours(each, num_heads=2).weights for each in (weights, old))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_leftover_and_missing_weights_are_named():
    weights = dict(reference().state_dict())
    with pytest.raises(ValueError, match=r"no rule takes: layers\.0\.attention\.extra$"):
        vivit.to_ours({**weights, "layers.0.attention.extra": torch.zeros(1)}, num_heads=2)
    del weights["layers.1.attention.k_proj.bias"]
    with pytest.raises(ValueError, match=r"missing: layers\.1\.attention\.k_proj\.bias$"):
        vivit.to_ours(weights, num_heads=2)
