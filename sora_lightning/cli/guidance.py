"""What `sample` is told of guidance beside its scale, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sora_lightning.diffusion import GuidanceRecipe
from sora_lightning.generation import Guide
from sora_lightning.systems import DiffusionSystem


@dataclass(frozen=True)
class GuidanceArguments:
    """As they are given: ``interval`` as ``LOW,HIGH``, ``guide`` the path of a checkpoint.

    Raises ``ValueError`` for what is out of range, and for an argument that could change nothing.
    """

    scale: float
    interval: str | None = None
    rescale: float | None = None
    channels: int | None = None
    guide: Path | None = None
    frame_guidance: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if given and self.frame_guidance is not None:
            raise ValueError(
                f"{given[0]} has no meaning beside --frame-guidance, whose formula is its own"
            )
        if given and self.scale == 1:
            raise ValueError(
                f"{given[0]} has no meaning with --guidance-scale 1: nothing is guided"
            )
        for flag in ("--guidance-rescale", "--guidance-channels"):
            if self.guide is not None and flag in given:
                raise ValueError(f"{flag} has no meaning beside --guide, which guides by a network")
        if self.guide is not None and not self.guide.is_file():
            raise ValueError(f"--guide {self.guide}: no such file")
        if self.rescale is not None and not 0 <= self.rescale <= 1:
            raise ValueError(f"--guidance-rescale {self.rescale:g}: must lie in [0, 1]")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"--guidance-channels {self.channels}: must be at least 1")
        self.recipe()

    def _given(self) -> list[str]:
        values = {
            "--guidance-interval": self.interval,
            "--guidance-rescale": self.rescale,
            "--guidance-channels": self.channels,
            "--guide": self.guide,
        }
        return [flag for flag, value in values.items() if value is not None]

    def recipe(self) -> GuidanceRecipe:
        interval = (0.0, 1.0) if self.interval is None else _times(self.interval)
        return GuidanceRecipe(interval, self.rescale or 0.0, self.channels)

    def check_against(self, system: DiffusionSystem) -> None:
        """Raise ``ValueError`` for more channels than the latents have."""
        if self.channels is None:
            return
        latents = system.tokenizer.latent_channels
        if self.channels > latents:
            raise ValueError(f"--guidance-channels {self.channels}: the latents have {latents}")

    def loaded_guide(self, system: DiffusionSystem, device: str) -> Guide | None:
        """``ValueError`` for a guide whose predictions are not of the system's latents."""
        if self.guide is None:
            return None
        guide = DiffusionSystem.from_checkpoint(self.guide).to(device).eval()
        same = {
            "latents (its tokenizer is another)": guide.tokenizer.fingerprint()
            == system.tokenizer.fingerprint(),
            "path of noise or kind of prediction": guide.objective.process
            == system.objective.process,
        }
        for what, equal in same.items():
            if not equal:
                raise ValueError(f"--guide {self.guide}: has not the checkpoint's {what}")
        if any(one.concatenation is not None for one in (guide, system)):
            raise ValueError(
                f"--guide {self.guide}: known frames as channels (model.init_args.concatenation) "
                "and a guide do not go together"
            )
        return Guide(guide.conditioner, guide.denoiser)


def _times(text: str) -> tuple[float, float]:
    try:
        start, end = map(float, text.split(","))
        GuidanceRecipe((start, end))
    except ValueError as error:
        raise ValueError(
            f"--guidance-interval {text}: must be two times with a comma between, "
            "0 <= LOW <= HIGH <= 1 (0 is data, 1 is noise)"
        ) from error
    return start, end
