"""A decoder that trains by itself leaves the latents as they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.checkpoints import load_tokenizer
from sora_lightning.systems import TokenizerSystem
from sora_lightning.systems.tokenizer import noisy_latents
from sora_lightning.tokenizers import (
    ConvTokenizer,
    VideoTokenizer,
    ViViTTokenizer,
)
from sora_lightning.tokenizers.ldm import LDMTokenizer
from sora_lightning.tokenizers.pretrained import WanTokenizer

STEPS = ("--trainer.max_steps", "4")


def of_decoder(tokenizer_checkpoint: Path, noise: float | None, **more: Any) -> dict[str, Any]:
    loaded = {
        "class_path": "sora_lightning.checkpoints.load_tokenizer",
        "init_args": {"checkpoint": str(tokenizer_checkpoint)},
    }
    arguments = {"tokenizer": loaded, "decoder_noise": noise, "warmup_steps": 1, **more}
    return {"class_path": "sora_lightning.systems.TokenizerSystem", "init_args": arguments}


def test_the_decoder_alone_trains(
    fit: Callable, tokenizer_checkpoint: Path, tmp_path: Path
) -> None:
    before = load_tokenizer(tokenizer_checkpoint)
    config = {"model": of_decoder(tokenizer_checkpoint, 0.3)}
    # Other lengths have other statistics: the latents must not be normalised by them.
    own = fit(config, tmp_path / "run", *STEPS, "--data.batching.sizes", "[9x16x16, 9x24x16]")
    # The checkpoint needs no other file, and is a tokenizer's like any.
    after = TokenizerSystem.from_checkpoint(own).tokenizer
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert torch.equal(after.posterior(video).mean, before.posterior(video).mean)
    torch.testing.assert_close(after.encode(video), before.encode(video))
    latents = before.encode(video)
    assert (after.decode_raw(latents) - before.decode_raw(latents)).abs().max() > 1e-3
    assert after.fingerprint() != before.fingerprint()
    again = load_tokenizer(own)
    assert again.fingerprint() == after.fingerprint()


def test_what_would_train_nothing_is_refused(
    fit: Callable, tokenizer_model: dict, tokenizer_checkpoint: Path, tmp_path: Path
) -> None:
    untrained = deepcopy(tokenizer_model)
    untrained["init_args"]["decoder_noise"] = 0.3
    with pytest.raises(ValueError, match=r"decoder_noise = 0\.3 .* must be a trained one"):
        fit({"model": untrained}, tmp_path / "a", *STEPS)
    with pytest.raises(ValueError, match="nothing trains: the tokenizer is loaded and frozen"):
        fit({"model": of_decoder(tokenizer_checkpoint, None)}, tmp_path / "b", *STEPS)
    with pytest.raises(ValueError, match=r"decoder_noise = -1\.0: must not be negative"):
        TokenizerSystem(ConvTokenizer(4, [8], [], [], patch=4), decoder_noise=-1.0)
    with pytest.raises(ValueError, match="warmup_steps = -1: must not be negative"):
        TokenizerSystem(ConvTokenizer(4, [8], [], [], patch=4), warmup_steps=-1)


def small(name: str) -> VideoTokenizer:
    if name == "conv":
        return ConvTokenizer(4, [8, 8], [True], [True], patch=4, linear_tubelets=True)
    if name == "ldm":
        return LDMTokenizer(4, 32, (1, 1), blocks_per_level=1)
    return ViViTTokenizer(4, (2, 8, 8))


@pytest.mark.parametrize("name", ["conv", "ldm", "vivit"])
def test_the_parts_of_the_decoder_are_those_that_only_decode(name: str) -> None:
    """By gradients: what encoding depends on and what decoding does."""
    tokenizer = small(name)
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # layers that start at 0 hide those before them
            parameter.add_(0.02 * torch.randn_like(parameter))
    video = torch.rand(1, 3, 3, 16, 16)
    posterior = tokenizer.posterior(video)
    (posterior.mean.square().mean() + posterior.log_variance.square().mean()).backward()
    encoding = {n for n, p in tokenizer.named_parameters() if p.grad is not None}
    tokenizer.zero_grad()
    tokenizer.decode_raw(posterior.mean.detach()).square().mean().backward()
    decoding = {n for n, p in tokenizer.named_parameters() if p.grad is not None}
    modules = {id(p) for part in tokenizer.decoder_parts() for p in part.parameters()}
    assert {n for n, p in tokenizer.named_parameters() if id(p) in modules} == decoding - encoding


def test_noise_is_measured_in_deviations_of_the_normalised_latents() -> None:
    tokenizer = ConvTokenizer(4, [8, 8], [True], [True], patch=4)
    covariance = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    tokenizer.set_latent_statistics(torch.arange(4.0), covariance)
    mean, noise = torch.randn(2, 4, 2, 2, 2), torch.randn(2, 4, 2, 2, 2)
    drawn = noisy_latents(tokenizer, mean, noise, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(drawn[0], mean[0])
    stds = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    torch.testing.assert_close(drawn[1], mean[1] + 0.5 * stds * noise[1])


def test_a_tokenizer_that_names_no_decoder_says_so() -> None:
    with pytest.raises(ValueError, match="WanTokenizer names no decoder apart"):
        WanTokenizer.decoder_parts(object.__new__(WanTokenizer))
