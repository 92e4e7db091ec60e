"""Writes what `predict` computes to disk, batch by batch, so that nothing is kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from sora_lightning.data.latents import LatentCache
from sora_lightning.systems import TokenizerSystem
from sora_lightning.types import VideoBatch


class LatentWriter(BasePredictionWriter):
    """Writes the latents that `predict` computes with a tokenizer to a latent cache.

    An existing cache is continued: the data module leaves out the clips that it already holds.
    Each rank writes its own shards. Does nothing in other commands.

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
        cache = self._opened(pl_module)
        for clip_id, latents in zip(batch.clip_ids, prediction, strict=True):
            cache.write(clip_id, latents)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._cache is not None:
            self._cache.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_predict_end(trainer, pl_module)

    def _opened(self, pl_module: LightningModule) -> LatentCache:
        """Return the cache, opened at the first batch: its fingerprint needs the loaded weights."""
        if self._cache is None:
            if not isinstance(pl_module, TokenizerSystem) or self.root is None:
                name = type(pl_module).__name__
                raise ValueError(
                    f"latents.root = {self.root}, model = {name}: predict needs a folder for the "
                    "latents, and a TokenizerSystem to make them"
                )
            fingerprint = pl_module.tokenizer.fingerprint()
            self._cache = LatentCache.create(self.root, fingerprint, self.dtype)
        return self._cache
