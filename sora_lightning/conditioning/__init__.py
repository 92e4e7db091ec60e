"""Conditioners, which read captions, and known frames."""

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.conditioning.images import ClipEncoder, GlobalEncoder, ImageEncoder
from sora_lightning.conditioning.known_frames import (
    ConcatChannels,
    ConcatConditioning,
    FirstFrameAndPosition,
    KnownFrameConditioning,
    KnownFrames,
    LatentSpace,
    MaskedLatents,
    TimeZeroConditioning,
)
from sora_lightning.conditioning.labels import LabelConditioner
from sora_lightning.conditioning.masks import (
    BothEnds,
    FirstFrames,
    FrameMask,
    Inpainting,
    LastFrames,
    TextToVideo,
    VideoEditing,
)
from sora_lightning.conditioning.text import TextConditioner, Unconditional

__all__ = [
    "BothEnds",
    "ClipEncoder",
    "ConcatChannels",
    "ConcatConditioning",
    "Conditioner",
    "FirstFrameAndPosition",
    "FirstFrames",
    "FrameMask",
    "GlobalEncoder",
    "ImageEncoder",
    "Inpainting",
    "KnownFrameConditioning",
    "KnownFrames",
    "LabelConditioner",
    "LastFrames",
    "LatentSpace",
    "MaskedLatents",
    "TextConditioner",
    "TextToVideo",
    "TimeZeroConditioning",
    "Unconditional",
    "VideoEditing",
]
