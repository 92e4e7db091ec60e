"""A diffusion system from the folder of a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sora_lightning.conditioning import (
    CachedText,
    ClipEmbedding,
    ClipPatches,
    ConcatConditioning,
    Conditioner,
    FirstFrameAndPosition,
    FirstFrames,
    FirstFrameThenGrey,
    FrozenTextEncoder,
    HunyuanVideoText,
    ImageEncoder,
    KnownFrameConditioning,
    PretrainedText,
)
from sora_lightning.denoisers import Denoiser, pretrained_denoiser
from sora_lightning.denoisers.lora import described
from sora_lightning.diffusers_folders import local_folder
from sora_lightning.diffusion import (
    Objective,
    TrainingTimes,
    pretrained_objective,
    pretrained_times,
)
from sora_lightning.layers.left_out import leave_in_folder
from sora_lightning.systems.diffusion import DiffusionSystem
from sora_lightning.systems.optimizers import MaximalUpdate, OptimizerFactory, adamw
from sora_lightning.tokenizers import VideoTokenizer, pretrained_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig

# How each pipeline encodes a caption; most tokens are the defaults of their calls.
_TEXT: dict[str, Callable[..., FrozenTextEncoder]] = {
    "WanPipeline": PretrainedText,
    "WanImageToVideoPipeline": PretrainedText,
    "LTXPipeline": partial(PretrainedText, max_tokens=128, padded=True),
    "CogVideoXPipeline": partial(PretrainedText, max_tokens=226, padded=True),
    "HunyuanVideoPipeline": HunyuanVideoText,
    "LattePipeline": partial(PretrainedText, max_tokens=120),
    "TextToVideoSDPipeline": partial(PretrainedText, padded=True),
    "I2VGenXLPipeline": partial(PretrainedText, padded=True, skipped_layers=1),
}
_PARTS = ("tokenizer", "conditioner", "denoiser", "time", "objective", "known_frames")


@dataclass(frozen=True)
class Pipeline:
    """The folder of a diffusers pipeline, or its name on the hub, and how its network trains.

    ``lora``, ``dtype`` and ``activation_checkpointing`` are those of ``pretrained_denoiser``.
    ``embeddings`` is a folder for the captions' embeddings, as ``CachedText`` keeps them, and for
    the text encoder's fingerprint: where both are there, the encoder is not loaded.

    Raises ``ValueError`` for a folder that holds no pipeline of those known here.
    """

    folder: Path
    lora: LoraConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    embeddings: Path | None = None

    def __post_init__(self) -> None:
        if not self._index.is_file():
            raise ValueError(
                f"folder = {str(self.folder)!r}: holds no model_index.json of a diffusers pipeline"
            )
        if self.name not in _TEXT:
            raise ValueError(
                f"folder = {str(self.folder)!r}: holds a {self.name}; a pipeline is one of "
                f"{', '.join(_TEXT)}"
            )
        if (self._held.get("transformer_2") or [None])[0] is not None:
            raise ValueError(
                f"folder = {str(self.folder)!r}: holds a {self.name} of two transformers for early "
                "and late times, as Wan 2.2 A14B: only pipelines of one are supported"
            )

    @property
    def name(self) -> str:
        """Class of the pipeline."""
        return str(self._held.get("_class_name"))

    @property
    def _held(self) -> dict[str, Any]:
        held: dict[str, Any] = json.loads(self._index.read_text())
        return held

    @property
    def path(self) -> Path:
        """The folder, or the copy in the hub's cache."""
        return local_folder(Path(self.folder))

    @property
    def _index(self) -> Path:
        return local_folder(Path(self.folder), "scheduler") / "model_index.json"

    @property
    def specification(self) -> dict[str, Any]:
        """The arguments as plain values, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
        return values | paths | {"lora": None if self.lora is None else described(self.lora)}

    def tokenizer(self) -> VideoTokenizer:
        """Return the autoencoder, frozen. Its weights stay in the folder."""
        tokenizer = pretrained_tokenizer(self.folder)
        leave_in_folder(tokenizer, "autoencoder", Path(self.folder))
        return tokenizer

    def conditioner(self) -> Conditioner:
        """Return the text encoders, frozen, as the pipeline uses them."""
        encoder = _TEXT[self.name](self.folder, fingerprints=self.embeddings)
        return encoder if self.embeddings is None else CachedText(encoder, self.embeddings)

    def denoiser(self, fps: float) -> Denoiser:
        """Return the network for clips of so many frames per second."""
        return pretrained_denoiser(
            self.folder, self.lora, self.dtype, self.activation_checkpointing, fps
        )

    def known_frames(self) -> KnownFrameConditioning | None:
        """Return how I2VGen-XL, or Wan from image to video, sees its first frame; ``None`` for text
        to video.
        """
        never = {"drop_frames": 0.0, "drop_both": 0.0}
        if self.name == "I2VGenXLPipeline":
            encoder = partial(self._image_encoder, ClipEmbedding)
            channels = FirstFrameAndPosition()
            return ConcatConditioning([FirstFrames(most=1)], channels, encoder, **never)
        if self.name != "WanImageToVideoPipeline" or self._held.get("expand_timesteps"):
            return None
        encoder = partial(self._image_encoder, ClipPatches)
        return FirstFrameThenGrey([FirstFrames(most=1)], encoder, **never)

    def _image_encoder(
        self, kind: Callable[..., ImageEncoder], latent_channels: int, width: int
    ) -> ImageEncoder:
        encoder = kind(latent_channels, width, self.folder)
        encoder.specification = None  # the folder names it
        leave_in_folder(encoder, "image encoder", Path(self.folder))
        return encoder


class PretrainedSystem(DiffusionSystem):
    """Fine-tunes the model of a diffusers pipeline. Each part that is not given is the folder's.

    Frozen weights of the folder are not saved: a checkpoint names the folder and holds digests of
    its weights. Other weights are refused when it is loaded.

    Args:
        pipeline: The folder, and how its network trains.
        tokenizer, conditioner, denoiser, time, objective, known_frames: In place of the pipeline's.
        drop_condition, optimizer, warmup_steps, fps, seed: See ``DiffusionSystem``.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: VideoTokenizer | None = None,
        conditioner: Conditioner | None = None,
        denoiser: Callable[[int, int], Denoiser] | None = None,
        time: TrainingTimes | None = None,
        objective: Objective | None = None,
        known_frames: KnownFrameConditioning | None = None,
        drop_condition: float = 0.1,
        optimizer: OptimizerFactory | MaximalUpdate = adamw,
        warmup_steps: int = 100,
        fps: float = 8.0,
        seed: int = 0,
    ):
        parts = (tokenizer, conditioner, denoiser, time, objective, known_frames)
        super().__init__(
            tokenizer or pipeline.tokenizer(),
            conditioner or pipeline.conditioner(),
            denoiser or pipeline.denoiser(fps),
            time or pretrained_times(pipeline.folder),
            objective or pretrained_objective(pipeline.folder),
            known_frames or pipeline.known_frames(),
            drop_condition=drop_condition,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            fps=fps,
            seed=seed,
        )
        self.pipeline = pipeline
        self._from_folder = [name for name, one in zip(_PARTS, parts, strict=True) if one is None]

    @property
    def is_pipelines(self) -> bool:
        """True if all parts, except training times, are those of the pipeline's folder."""
        return {*_PARTS} - {"time"} <= {*self._from_folder}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the folder alone for what comes from it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= dict.fromkeys(self._from_folder)
