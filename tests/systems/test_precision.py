"""Training in true half and double precision: weights, latents and text are of one type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

PRECISIONS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
UVIT = {
    "class_path": "sora_lightning.denoisers.UViT",
    "init_args": {"size": {"depth": 3, "width": 24, "num_heads": 2}, "patch": [1, 1, 1]},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", ["DiT", "UViT"])
def test_a_diffusion_model_trains_in_true_precision(
    network: str, precision: str, fit: Any, diffusion_model: dict[str, Any], tmp_path: Path
) -> None:
    if network == "UViT":
        init_args = {**diffusion_model["init_args"], "denoiser": UVIT}
        diffusion_model = {**diffusion_model, "init_args": init_args}
    limits = ("--trainer.max_steps=2", f"--trainer.precision={precision}")
    checkpoint = fit({"model": diffusion_model}, tmp_path / "run", *limits)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    trained = {name: w for name, w in weights.items() if name.startswith("denoiser.")}
    assert {w.dtype for w in trained.values()} == {PRECISIONS[precision]}
    assert all(bool(w.isfinite().all()) for w in trained.values())
