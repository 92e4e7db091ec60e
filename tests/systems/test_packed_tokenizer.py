"""A tokenizer trains on packs: each clip's loss is the one that it has alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sora_lightning.checkpoints import load_tokenizer
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import TokenizerSystem
from sora_lightning.systems.draws import make_rng
from sora_lightning.tokenizers import ViViTTokenizer
from tests.systems.test_packed_training import PACKED, batch_of, gradients, losses_of
from tests.systems.test_systems import assert_same_weights

VIVIT = {
    "class_path": "sora_lightning.systems.TokenizerSystem",
    "init_args": {
        "tokenizer": {
            "class_path": "sora_lightning.tokenizers.ViViTTokenizer",
            "init_args": {
                "latent_channels": 4,
                "tubelet": [2, 8, 8],
                "encoder": {"depth": 2, "width": 24, "num_heads": 2},
                "layout": {
                    "class_path": "sora_lightning.layers.partitions.FactorisedSelfAttention"
                },
            },
        },
        "warmup_steps": 2,
    },
}


@pytest.fixture
def system() -> TokenizerSystem:
    return TokenizerSystem(ViViTTokenizer(4, (2, 8, 8), TransformerSize(2, 24, 2)))


def test_a_packed_loss_is_that_of_the_clips_alone(system: TokenizerSystem) -> None:
    batch = batch_of([0, 1, 2, 3, 4])
    together = losses_of(system, batch)
    assert together.shape == (5,)
    for i in range(5):
        video = batch.videos[i][None]
        posterior = system.tokenizer.posterior(video)
        noise = torch.randn(posterior.mean.shape[1:], generator=make_rng("cpu", 0, i, i % 3))
        decoded = system.tokenizer.decode_raw(posterior.sample(noise[None]))
        loss, _ = system.loss(decoded, video, posterior)
        torch.testing.assert_close(together[i], loss, atol=1e-5, rtol=1e-5)


def test_every_clip_counts_alike_in_whichever_pack(
    system: TokenizerSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = gradients(system, [batch_of([0, 1, 2, 3, 4])], monkeypatch)
    shared = gradients(system, [batch_of([3]), batch_of([]), batch_of([0, 2, 1, 4])], monkeypatch)
    assert alone.keys() == shared.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-5, rtol=1e-5)


def test_a_packed_training_resumes_to_the_bit_and_leaves_statistics(
    fit: Callable, tmp_path: Path
) -> None:
    config = {"model": VIVIT, "data": PACKED}
    steps = ("--trainer.max_steps", "4")
    whole = fit(config, tmp_path / "whole", *steps, "--checkpoint.keep_every_n_steps", "2")
    middle = whole.parent / "step-00000002.ckpt"
    resumed = fit(config, tmp_path / "resumed", *steps, "--ckpt_path", str(middle))
    assert_same_weights(whole, resumed)
    tokenizer = load_tokenizer(whole)
    assert tokenizer.latent_std.std() > 0
    assert tokenizer.encode(torch.rand(1, 3, 3, 16, 8)).shape == (1, 4, 2, 2, 1)


def test_packs_of_another_kind_are_refused(fit: Callable, tmp_path: Path) -> None:
    dropping = {"class_path": "sora_lightning.data.batching.native_sizes.BetaDropping"}
    dropping["init_args"] = {"mean": 0.5, "largest": 0.5}
    data = PACKED | {"packing": PACKED["packing"] | {"dropping": dropping}}
    with pytest.raises(ValueError, match=r"data\.packing\.dropping is set: a tokenizer gives back"):
        fit({"model": VIVIT, "data": data}, tmp_path / "dropping")
    data = PACKED | {"packing": PACKED["packing"] | {"compression": "4x8x8"}}
    with pytest.raises(ValueError, match="compression = 4x8x8: the tokenizer's is 2x8x8"):
        fit({"model": VIVIT, "data": data}, tmp_path / "geometry")
