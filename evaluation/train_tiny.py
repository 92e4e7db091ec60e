"""Training of the small networks on a manifest: ``python -m evaluation train-tiny``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from evaluation.features.tiny import (
    TinyConfig,
    TinyNetwork,
    contrastive_loss,
    save_tiny,
)
from evaluation.inputs import (
    Video,
    VideoEntry,
    as_batch,
    cover,
    nearest_size,
    read_entries,
    read_video,
    squash,
)
from evaluation.protocol import ClipSpec


@dataclass(frozen=True)
class TinyTraining:
    """Hyperparameters: AdamW with a one-cycle learning rate.

    Clips are shifted randomly by up to ``greatest_shift`` pixels.
    """

    num_steps: int = 200
    batch_size: int = 48
    learning_rate: float = 2e-3
    greatest_shift: int = 2
    seed: int = 0


def train_tiny(
    manifest: Path,
    output: Path,
    validation: Path | None,
    clips: ClipSpec,
    training: TinyTraining,
    root: str | None = None,
) -> dict[str, float]:
    """Train on a manifest, save to ``output``, and return the accuracy on ``validation``.

    Without ``validation`` the result is empty. Clips that are too short or damaged are left out and
    named. Raises ``ValueError`` as ``read_entries`` does, and for fewer than 8 clips.
    """
    listed = read_entries(manifest, root=root)
    val_entries = [] if validation is None else read_entries(validation, root=root)
    torch.manual_seed(training.seed)
    network = TinyNetwork(TinyConfig())
    entries, decoded = _decoded(listed, clips, network.config.side)
    if len(entries) < 8:
        raise ValueError(
            f"{manifest}: {len(entries)} of {len(listed)} clips are whole and long enough; a "
            "contrast needs at least 8"
        )
    videos = as_batch(decoded)
    _fit(network, videos, entries, training)
    network.eval().standardise(_features(network, videos))
    notes: dict[str, float] = {}
    if val_entries:
        val_entries, val_videos = _decoded(val_entries, clips, network.config.side)
        notes = measure(network, as_batch(val_videos), val_entries)
    save_tiny(network, output, notes)
    return notes


def measure(
    network: TinyNetwork, videos: UInt8[Tensor, "n 3 F H W"], entries: Sequence[VideoEntry]
) -> dict[str, float]:
    """Return the retrieval accuracy of a network on clips that it was not trained on, in 0..1.

    ``own_over_other`` is the share of pairs in which a clip is closer to its own caption than to
    another clip's (0.5 at chance level). ``top1`` and ``top5`` are the shares of clips whose own
    caption is the closest, or among the five closest, of all.
    """
    network.eval()
    with torch.no_grad():
        likeness = network.embed_videos(videos) @ network.embed_texts([e.prompt for e in entries]).T
    own = likeness.diagonal()[:, None]
    rank = (likeness > own).sum(dim=1)
    others = len(entries) - 1
    return {
        "num_clips": float(len(entries)),
        "own_over_other": float((likeness < own).sum() / (len(entries) * others)),
        "top1": float((rank < 1).float().mean()),
        "top5": float((rank < 5).float().mean()),
    }


@torch.no_grad()
def _features(network: TinyNetwork, videos: UInt8[Tensor, "n 3 F H W"]) -> Float[Tensor, "n d"]:
    return torch.cat([network.features(part) for part in videos.split(64)])


def _decoded(
    entries: Sequence[VideoEntry], clips: ClipSpec, side: int
) -> tuple[list[VideoEntry], list[Video]]:
    """Return the clips at the protocol's sizes, as in an evaluation, then resized for the network;
    and their entries, without those that cannot be read.
    """
    kept, videos = [], []
    for entry in tqdm(entries, desc="decode", unit="clip"):
        try:
            video = read_video(entry.file, clips.num_frames, clips.fps)
        except ValueError as error:
            tqdm.write(f"left out: {error}")
            continue
        size = nearest_size(video.shape[1:3], clips.heights_and_widths)
        kept.append(entry)
        videos.append(squash(cover(video, *size), side))
    return kept, videos


def _fit(
    network: TinyNetwork,
    videos: UInt8[Tensor, "n 3 F H W"],
    entries: Sequence[VideoEntry],
    training: TinyTraining,
) -> None:
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.num_steps, pct_start=0.1
    )
    batch_size = min(training.batch_size, len(videos))
    bar = tqdm(range(training.num_steps), desc="train", unit="step")
    for _ in bar:
        batch = torch.randperm(len(videos), generator=generator)[:batch_size]
        texts = [_wording(entries[i], generator) for i in batch.tolist()]
        clips = _shifted(videos[batch], training.greatest_shift, generator)
        loss = contrastive_loss(network, clips, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _wording(entry: VideoEntry, generator: torch.Generator) -> str:
    return entry.wordings[torch.randint(len(entry.wordings), (), generator=generator)]


def _shifted(
    videos: UInt8[Tensor, "b 3 F H W"], greatest: int, generator: torch.Generator
) -> UInt8[Tensor, "b 3 F H W"]:
    """Shift the whole batch by one random offset in pixels, repeating the edges."""
    if greatest == 0:
        return videos
    down, right = torch.randint(-greatest, greatest + 1, (2,), generator=generator).tolist()
    rows = (torch.arange(videos.shape[3]) - down).clamp(0, videos.shape[3] - 1)
    columns = (torch.arange(videos.shape[4]) - right).clamp(0, videos.shape[4] - 1)
    return videos[:, :, :, rows][..., columns]
