"""Writes what `predict` computes to disk, batch by batch, so that nothing is kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sora_lightning.captioner.captioned_manifest import CaptionedManifest, Written
from sora_lightning.data import VideoDataModule
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.spec import DataSpec
from sora_lightning.systems import DiffusionSystem, RecaptioningSystem, TokenizerSystem
from sora_lightning.types import VideoBatch


class LatentWriter(BasePredictionWriter):
    """Writes the latents that `predict` computes with a tokenizer to a latent cache.

    An existing cache is continued: the data module leaves out the clips that it already holds.
    Each rank writes its own shards. Does nothing in other commands, or without a root.

    Args:
        root: The cache's folder, which `data.latents` of the next training names.
        dtype: How they are kept: float16 or float32.
    """

    def __init__(
        self, root: Path | None = None, dtype: Literal["float16", "float32"] = "float16"
    ) -> None:
        super().__init__(write_interval="batch")
        self.root = root
        self.dtype = dtype
        self._cache: LatentCache | None = None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Float[Tensor, "b c f h w"],
        batch_indices: Sequence[int] | None,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self.root is None:
            return
        cache = self._opened(pl_module, self.root)
        for clip_id, latents in zip(batch.clip_ids, prediction, strict=True):
            cache.write(clip_id, latents)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the cache holds, and the clips that it lacks."""
        if self._cache is None or self.root is None:
            return
        self._cache.close()
        trainer.strategy.barrier()  # until the other ranks have written theirs
        cache, data = LatentCache.open(self.root), trainer.datamodule  # type: ignore[attr-defined]
        size_gb = sum(path.stat().st_size for path in self.root.glob("*.safetensors")) / 1e9
        lines = [f"{self.root}: latents of {len(cache)} windows, {size_gb:.3g} GB"]
        if isinstance(data, VideoDataModule):
            for manifest, kept in data.encoded(cache).items():
                total = kept.num_clips + kept.num_removed
                lines.append(f"{manifest}: {kept.num_clips} of {total} clips\n{kept}")
        rank_zero_info("\n".join(lines))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._cache is not None:
            self._cache.close()

    def _opened(self, pl_module: LightningModule, root: Path) -> LatentCache:
        """Return the cache, opened at the first batch: its fingerprint needs the loaded weights."""
        if self._cache is None:
            if not isinstance(pl_module, TokenizerSystem | DiffusionSystem):
                raise ValueError(
                    f"latents.root = {root}: a system with a tokenizer makes latents, and model is "
                    f"{type(pl_module).__name__}"
                )
            fingerprint = pl_module.tokenizer.fingerprint()
            self._cache = LatentCache.create(root, fingerprint, self.dtype)
        return self._cache


class CaptionWriter(BasePredictionWriter):
    """Writes the captions that `predict` makes with a captioner into a copy of `data.manifest`.

    Beside each stand the captioner's fingerprint, in the column with `_model` at its end, and the
    decoding, its seed, the captions a clip and the clips' frame rate and sizes, in that with
    `_decoding`. An interrupted call is gone on with: clips that have captions are left out. Does
    nothing in other commands, or without an output.

    Args:
        output: The copy, in the manifest's folder; JSONL, CSV, Parquet or Arrow by its suffix.
        column: Where the captions stand. Captions by people or by another captioner that stand
            there already are refused.
    """

    def __init__(self, output: Path | None = None, column: str = "caption_synthetic") -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self.column = column
        # The data module leaves out the clips in it. Every rank reads it before one writes.
        self.captioned: CaptionedManifest | None = None
        self._model = self._how = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict" or self.output is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not (isinstance(pl_module, RecaptioningSystem) and isinstance(data, VideoDataModule)):
            raise ValueError(
                f"captions.output = {self.output}: a RecaptioningSystem writes captions of a "
                f"VideoDataModule, and model is a {type(pl_module).__name__}"
            )
        self.captioned = CaptionedManifest(data.manifest, self.output, self.column)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Not earlier: the fingerprint is that of the averaged weights.
        if self.captioned is None or self._model:
            return
        assert isinstance(pl_module, RecaptioningSystem)
        self._model = pl_module.captioner.fingerprint()
        self._how = _settings(pl_module, trainer.datamodule.spec)  # type: ignore[attr-defined]
        self.captioned.require(self._model, self._how)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[list[str]],
        batch_indices: Sequence[int] | None,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self.captioned is None:
            return
        written = {
            clip: Written(captions, self._model, self._how)
            for clip, captions in zip(batch.clip_ids, prediction, strict=True)
        }
        self.captioned.add(trainer.global_rank, written)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.captioned is None:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            rank_zero_info(self.captioned.write())


def _settings(system: RecaptioningSystem, spec: DataSpec) -> str:
    """Return all that captions depend on beside the captioner and the clip."""
    sizes = ",".join(map(str, spec.sizes)) or spec.packing
    draws = f"{system.decoding}, seed={system.seed}, captions_per_clip={system.captions_per_clip}"
    return f"{draws}, fps={spec.fps:g}, sizes={sizes}"
