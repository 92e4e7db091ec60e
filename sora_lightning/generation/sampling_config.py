"""Options of sampling: one frozen dataclass that the command line, callbacks, evaluation and the
record of a video hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_file, require_in, require_positive
from sora_lightning.denoisers import FeatureCaching
from sora_lightning.diffusion import (
    DDIM,
    DDPM,
    Sampler,
    UniPC,
    VarianceExploding,
    check_interval,
    dpm_solver,
    euler,
    heun,
    karras_times,
    spaced_times,
    uniform_times,
)
from sora_lightning.diffusion import Path as NoisePath
from sora_lightning.tokenizers import Tiling

SamplerName = Literal[
    "euler",
    "heun",
    "ddim",
    "ddim-ancestral",
    "ddpm",
    "ddpm-large",
    "dpm-solver",
    "unipc",
    "unipc-3",
]
SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ddim": DDIM(),
    "ddim-ancestral": DDIM(eta=1.0),
    "ddpm": DDPM(),
    "ddpm-large": DDPM(large_variance=True),
    "dpm-solver": dpm_solver,
    "unipc": UniPC(),
    "unipc-3": UniPC(order=3),
}


@dataclass(frozen=True)
class TimeGrid:
    """The diffusion times that a sampler visits.

    Args:
        kind: uniform (even in time, then shifted), karras (EDM's grid, for a variance-exploding
            path) or spaced (steps of a discrete diffusion, as DiT samples).
        shift: Shift of uniform times towards noise; by default that of the training.
        sigma_min: Smallest noise level of karras times.
        num_values: Number of training steps that spaced times are chosen from.
    """

    kind: Literal["uniform", "karras", "spaced"] = "uniform"
    shift: float | None = None
    sigma_min: float = 0.002
    num_values: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "karras", "spaced"):
            raise ValueError(f"time_grid.kind = {self.kind}: must be uniform, karras or spaced")
        if self.shift is not None and self.kind != "uniform":
            raise ValueError(f"time_grid.shift = {self.shift}: is for uniform times alone")
        require_positive(where="time_grid.", shift=self.shift)

    def times(
        self, num_steps: int, path: NoisePath, training_shift: Callable[[], float]
    ) -> Float[Tensor, " s"]:
        """Return ``num_steps + 1`` falling times, the last of them 0.

        Raises ``ValueError`` for karras times on a path that is not variance exploding.
        """
        if self.kind == "spaced":
            return spaced_times(num_steps, self.num_values)
        if self.kind == "karras":
            if not isinstance(path, VarianceExploding):
                raise ValueError(
                    "time_grid.kind = karras: is for a VarianceExploding path, and the model was "
                    f"trained on a {type(path).__name__}"
                )
            return karras_times(num_steps, path, self.sigma_min)
        return uniform_times(num_steps, training_shift() if self.shift is None else self.shift)


@dataclass(frozen=True)
class GuidanceConfig:
    """How the prompt, a weaker model and known frames guide sampling.

    Args:
        scale: Weight of the prompt (classifier-free guidance), or of the difference to the weak
            model; 1 is no guidance.
        interval: Two times, 0.1,0.8 say (0 is data, 1 is noise): guidance acts between them only,
            outside of them the prompt alone.
        rescale: Share, from 0 to 1, of the rescaled prediction, which keeps the standard deviation
            of the conditional one; a large scale overexposes otherwise.
        channels: Number of latent channels that are guided, the first ones; DiT guides 3 of 4.
        weak_model: Checkpoint of a weaker model on the same latents, smaller or trained for less
            time: guidance leads away from it (autoguidance), in place of no caption.
        frame_guidance: Weight of the known frames, or of the video that instruct changes, beside
            that of the prompt, in a third call a step.
    """

    scale: float = 2.0
    interval: tuple[float, ...] = (0.0, 1.0)
    rescale: float = 0.0
    channels: int | None = None
    weak_model: Path | None = None
    frame_guidance: float | None = None

    def __post_init__(self) -> None:
        check_interval("guidance.interval", self.interval)
        require_in("[0, 1]", where="guidance.", rescale=self.rescale)
        require_at_least(1, where="guidance.", channels=self.channels)
        if self.weak_model is not None:
            require_file("guidance.weak_model =", self.weak_model)
        changed = self._changed()
        if changed and self.frame_guidance is not None:
            raise ValueError(
                f"{changed[0]} has no meaning beside guidance.frame_guidance, whose formula is its "
                "own"
            )
        if changed and self.scale == 1:
            raise ValueError(
                f"{changed[0]} has no meaning with guidance.scale = 1: nothing is guided"
            )
        for key in ("guidance.rescale", "guidance.channels"):
            if self.weak_model is not None and key in changed:
                raise ValueError(
                    f"{key} has no meaning beside guidance.weak_model, which guides by a network"
                )

    def _changed(self) -> list[str]:
        """Return the names of the options of guidance by text that are set."""
        default = {"interval": (0.0, 1.0), "rescale": 0.0, "channels": None, "weak_model": None}
        return [f"guidance.{key}" for key, unset in default.items() if getattr(self, key) != unset]


@dataclass(frozen=True)
class SamplingConfig:
    """How videos are sampled.

    Args:
        sampler: Method that goes from noise to data.
        num_steps: Steps of the sampler.
        time_grid: Times that the sampler visits.
        guidance: Guidance by the prompt, a weaker model and known frames.
        frame_noise: Diffusion time at which the network sees known frames; 0 is clean.
        resample_strength: Share of the steps that are taken once more over a video that leads to
            given frames (connect, loop, extend-backward); 0 takes none.
        cache: Feature caching: the middle blocks are computed at some of the steps only.
        tiling: Tiles by which the tokenizer decodes frames too large for the memory; by default
            each frame is decoded whole.
    """

    sampler: SamplerName = "euler"
    num_steps: int = 50
    time_grid: TimeGrid = field(default_factory=TimeGrid)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    frame_noise: float = 0.0
    resample_strength: float = 0.3
    cache: FeatureCaching = field(default_factory=FeatureCaching)
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        require_at_least(1, num_steps=self.num_steps)
        require_in("[0, 1)", frame_noise=self.frame_noise)
        require_in("[0, 1]", resample_strength=self.resample_strength)
