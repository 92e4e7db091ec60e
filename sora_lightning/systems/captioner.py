"""Trains a captioner on clips and their captions, and captions clips with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sora_lightning.captioner import CoCa
from sora_lightning.captioner.base import Captioner
from sora_lightning.captioner.coca import CaptionerOutput, contrastive_losses
from sora_lightning.captioner.decoding import Decoding, Greedy, Nucleus
from sora_lightning.captioner.named_words import NamedWords
from sora_lightning.captioner.retrieval import Retrieval, caption_hashes
from sora_lightning.checkpoints import load_system, plain_hyperparameters
from sora_lightning.checks import naming, require_at_least
from sora_lightning.data import VideoDataModule
from sora_lightning.data.batching.native_sizes import check_geometry
from sora_lightning.data.manifest.records import one_line
from sora_lightning.systems.batches import data_spec, mean_loss, no_losses, of_all_ranks
from sora_lightning.systems.draws import make_rng
from sora_lightning.systems.optimizers import OptimizerFactory, adamw, configure
from sora_lightning.types import PackedBatch, VideoBatch

NUM_SHOWN = 8  # clips whose captions a validation logs as text


class RecaptioningSystem(L.LightningModule):
    """Captions clips in ``predict`` with a captioner that has its weights, and does not train.

    Args:
        captioner: Writes the captions, such as ``PretrainedCaptioner``.
        decoding: How the tokens of a caption are chosen.
        captions_per_clip: Captions that ``predict`` draws for each clip, of which a training is
            served another each time.
        seed: Seed of a decoding that draws, by clip.

    Raises ``ValueError`` for several captions of a decoding that does not draw: they would be
    equal; and for candidates of a captioner without contrastive embeddings.
    """

    captioner: Captioner

    def __init__(
        self,
        captioner: Captioner,
        decoding: Decoding = Greedy(),  # noqa: B008 (frozen)
        captions_per_clip: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        require_at_least(1, captions_per_clip=captions_per_clip)
        if captions_per_clip > 1 and not isinstance(decoding, Nucleus):
            raise ValueError(
                f"captions_per_clip = {captions_per_clip}: {type(decoding).__name__} would write "
                "the same caption each time; decoding must be Nucleus"
            )
        if decoding.num_candidates > 1 and not isinstance(captioner, CoCa):
            raise ValueError(
                f"num_candidates = {decoding.num_candidates}: a {type(captioner).__name__} has no "
                "embeddings by which to compare captions with a clip; must be 1"
            )
        self.captioner = captioner
        self.decoding = decoding
        self.captions_per_clip = captions_per_clip
        self.seed = seed

    def predict_step(
        self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[list[str]]:
        """Return the captions of each clip."""
        rngs = [make_rng(self.device, self.seed, name) for name in batch.clip_ids]
        return self.captioner.captions(batch.pixels, self.decoding, rngs, self.captions_per_clip)


class CaptionerSystem(RecaptioningSystem):
    """Contrastive and captioning loss (CoCa, arXiv 2205.01917, equation 4).

    The vocabulary is learned from the training's captions before the first step, unless
    ``checkpoint.start_from`` brings one. In training the clips of all ranks are each other's
    negatives, in validation those of a rank's batch.

    Args:
        captioner: The networks.
        contrastive: Weight of the contrastive loss; 1 in the paper.
        captioning: Weight of the captioning loss; 2 in the paper.
        optimizer: A factory that is called with the parameter groups.
        warmup_steps: Steps in which the learning rate grows.
        decoding: How ``predict`` writes captions.
        captions_per_clip: Captions that ``predict`` draws for each clip.
        seed: Seed of a decoding that draws, by clip.
        named_words: Words by attribute. Validation then captions every clip, and logs how often
            they are those of the right caption (``NamedWords``).
    """

    captioner: CoCa

    def __init__(
        self,
        captioner: CoCa,
        contrastive: float = 1.0,
        captioning: float = 2.0,
        optimizer: OptimizerFactory = adamw,
        warmup_steps: int = 100,
        decoding: Decoding = Greedy(),  # noqa: B008 (frozen)
        captions_per_clip: int = 1,
        seed: int = 0,
        named_words: dict[str, list[str]] | None = None,
    ):
        super().__init__(captioner, decoding, captions_per_clip, seed)
        require_at_least(
            0, contrastive=contrastive, captioning=captioning, warmup_steps=warmup_steps
        )
        self.save_hyperparameters()
        self.contrastive = contrastive
        self.captioning = captioning
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.retrieval = Retrieval()
        self.named_words = None if named_words is None else NamedWords(named_words)

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> CaptionerSystem:
        """Return the system with averaged weights, ready to caption. ``ValueError`` for a file that
        holds none.
        """
        return load_system(cls, path)

    def setup(self, stage: str) -> None:
        """Learn the vocabulary where there is none.

        Raises ``ValueError`` for sizes that the tubelets do not divide, and for captions that are
        empty or beyond the context.
        """
        if stage == "fit":
            plain_hyperparameters(self)  # what cannot be saved is refused before the first step
        self._check_sizes()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit" or not isinstance(data, VideoDataModule):
            return
        bpe = self.captioner.bpe
        if not bpe.is_trained:
            bpe.train_on(caption for _, caption in _captions(data, data.manifest))
            bpe.set_extra_state(self.trainer.strategy.broadcast(bpe.get_extra_state()))
        for manifest in data.check():
            self._check_captions(data, manifest)

    def on_validation_start(self) -> None:
        """Check the captions of ``validate``, whose vocabulary comes with the weights."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.state.fn == "validate" and isinstance(data, VideoDataModule):
            assert data.val_manifest is not None
            self._check_captions(data, data.val_manifest)

    def _check_sizes(self) -> None:
        spec, compression = data_spec(self), self.captioner.encoder.compression
        if spec is None:
            return
        if spec.packing is not None:
            check_geometry(spec.packing.compression, spec.packing.patch, compression, None)
        with naming("data.batching.sizes:"):
            for size in spec.sizes:
                compression.grid(size)

    def _check_captions(self, data: VideoDataModule, manifest: Path) -> None:
        context = self.captioner.tower.context
        for path, caption in _captions(data, manifest):
            (ids,) = self.captioner.bpe.pieces([caption])
            if not ids or len(ids) + 2 > context:
                rule = "is empty" if not ids else f"has {len(ids)} tokens beside begin and end"
                raise ValueError(
                    f"{manifest}: the caption of {path.name}, {caption[:60]!r}, {rule}: "
                    f"model.init_args.captioner.init_args.context = {context} holds 1 to "
                    f"{context - 2}"
                )

    def training_step(self, batch: VideoBatch | PackedBatch, batch_idx: int) -> Float[Tensor, ""]:
        if not len(batch):
            return mean_loss(self, batch, self.no_losses())
        output, contrastive = self.losses(batch)
        losses = self.contrastive * contrastive + self.captioning * output.losses
        terms = {
            "train/contrastive": contrastive.mean(),
            "train/captioning": output.losses.mean(),
            "train/token_accuracy": output.accuracy.mean(),
        }
        self.log_dict(terms, batch_size=len(batch))
        return mean_loss(self, batch, losses)

    def losses(
        self, batch: VideoBatch | PackedBatch
    ) -> tuple[CaptionerOutput, Float[Tensor, " b"]]:
        """Return the captioner's output and the contrastive loss of each clip."""
        kept = batch.kept if isinstance(batch, PackedBatch) else None
        output = self.captioner(batch.pixels, batch.captions, kept)
        pairs = torch.cat([output.video, output.text], dim=1).float()
        hashes = caption_hashes(batch.captions).to(self.device)[:, None]
        own = slice(None)
        if self.training:
            (pairs, own), (hashes, _) = of_all_ranks(pairs), of_all_ranks(hashes)
        video, text = pairs.chunk(2, dim=1)
        scale = self.captioner.inverse_temperature
        return output, contrastive_losses(video, text, hashes == hashes.T, scale)[own]

    def no_losses(self) -> Float[Tensor, "0"]:
        """Return the losses of a rank without clips, which exchanges what ``losses`` does."""
        nothing = no_losses(self.parameters()).float()
        width = 2 * self.captioner.text_out.out_features
        pairs, own = of_all_ranks(nothing.reshape(0, width))
        of_all_ranks(torch.empty(0, 1, dtype=torch.int64, device=self.device))
        return pairs[own].flatten()

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        output, contrastive = self.losses(batch)
        losses = self.contrastive * contrastive + self.captioning * output.losses
        scores = {
            "val/loss": losses.mean(),
            "val/captioning": output.losses.mean(),
            "val/token_accuracy": output.accuracy.mean(),
        }
        self.log_dict(scores, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self.retrieval.update(output.video, output.text, batch.captions)
        if self.named_words is None and batch_idx > 0:
            return
        captions = [drawn[0] for drawn in self.predict_step(batch, batch_idx)]
        if self.named_words is not None:
            self.named_words.update(captions, batch.captions)
        if batch_idx == 0:
            self._show(captions[:NUM_SHOWN], batch.captions)

    def _show(self, captions: list[str], right: list[str]) -> None:
        pairs = [*zip(captions, right, strict=False)]
        cells = [[_literal(one_line(text)) for text in pair] for pair in pairs]
        rows = [f"| {a} | {b} |" for a, b in cells]
        table = "\n".join(["| by the captioner | by people |", "|---|---|", *rows])
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/captions", table, self.global_step)

    def on_validation_epoch_end(self) -> None:
        scores = self.retrieval.compute().items()
        self.log_dict({f"val/retrieval/{name}": score for name, score in scores})
        self.retrieval.reset()
        if self.named_words is not None:
            named = self.named_words.compute().items()
            self.log_dict({f"val/named/{name}": share for name, share in named})
            self.named_words.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.optimizer, self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = plain_hyperparameters(self)


def _captions(data: VideoDataModule, manifest: Path) -> Iterator[tuple[Path, str]]:
    """Yield every caption that a manifest's clips may be served with, and the file of its clip."""
    for clips in data.check()[manifest].clips.values():
        for record in clips:
            for caption in record.captions:
                yield record.path, caption


def _literal(text: str) -> str:
    """Return Markdown that shows the text as it is: a caption cannot bring images or links."""
    return re.sub(r"[&<>|\\`*_\[\]!#~]", lambda mark: f"&#{ord(mark[0])};", text)
