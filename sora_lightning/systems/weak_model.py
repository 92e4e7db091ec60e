"""Loads the weaker model of autoguidance from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sora_lightning.conditioning import ConcatConditioning
from sora_lightning.generation import WeakModel

if TYPE_CHECKING:
    from sora_lightning.systems.diffusion import DiffusionSystem


def load_weak_model(system: DiffusionSystem, path: Path) -> WeakModel:
    """Load the weak model that guides a system's sampling.

    Raises ``ValueError`` where its tokenizer, noise path or prediction differs from the system's,
    or where known frames are channels.
    """
    weak = type(system).from_checkpoint(path).to(system.device).eval()
    same = {
        "latents (its tokenizer is another)": weak.tokenizer.fingerprint()
        == system.tokenizer.fingerprint(),
        "path of noise or kind of prediction": weak.objective.process == system.objective.process,
    }
    for what, equal in same.items():
        if not equal:
            raise ValueError(f"guidance.weak_model = {path}: has not the checkpoint's {what}")
    if any(isinstance(one.known_frames, ConcatConditioning) for one in (weak, system)):
        raise ValueError(
            f"guidance.weak_model = {path}: known frames as channels "
            "(ConcatConditioning) and a weak model do not go together"
        )
    return WeakModel(weak.conditioner, weak.denoiser)
