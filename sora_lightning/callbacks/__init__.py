"""Callbacks: what surrounds a training and is no part of a model."""

from sora_lightning.callbacks.checkpoint import RunCheckpoint
from sora_lightning.callbacks.ema import EMA
from sora_lightning.callbacks.nonfinite import SkipNonFinite
from sora_lightning.callbacks.progress import Progress
from sora_lightning.callbacks.samples import ReconstructVideos, SampleVideos
from sora_lightning.callbacks.scores import ScoreVideos, VideoScore
from sora_lightning.callbacks.throughput import Throughput
from sora_lightning.callbacks.watchdog import Watchdog
from sora_lightning.callbacks.writers import CaptionWriter, LatentWriter

__all__ = [
    "EMA",
    "CaptionWriter",
    "LatentWriter",
    "Progress",
    "ReconstructVideos",
    "RunCheckpoint",
    "SampleVideos",
    "ScoreVideos",
    "SkipNonFinite",
    "Throughput",
    "VideoScore",
    "Watchdog",
]
