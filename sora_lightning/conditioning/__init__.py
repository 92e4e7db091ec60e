"""Conditioners, which read captions, and known frames."""

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.conditioning.frozen import CachedText, FrozenTextEncoder
from sora_lightning.conditioning.grey_frames import FirstFrameThenGrey
from sora_lightning.conditioning.hunyuan_video import HunyuanVideoText
from sora_lightning.conditioning.images import (
    ClipEmbedding,
    ClipEncoder,
    ClipPatches,
    GlobalEncoder,
    ImageEncoder,
)
from sora_lightning.conditioning.joined import JoinedText, TextPart
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
from sora_lightning.conditioning.pretrained import PretrainedText
from sora_lightning.conditioning.text import TextConditioner, Unconditional

__all__ = [
    "BothEnds",
    "CachedText",
    "ClipEmbedding",
    "ClipEncoder",
    "ClipPatches",
    "ConcatChannels",
    "ConcatConditioning",
    "Conditioner",
    "FirstFrameAndPosition",
    "FirstFrameThenGrey",
    "FirstFrames",
    "FrameMask",
    "FrozenTextEncoder",
    "GlobalEncoder",
    "HunyuanVideoText",
    "ImageEncoder",
    "Inpainting",
    "JoinedText",
    "KnownFrameConditioning",
    "KnownFrames",
    "LabelConditioner",
    "LastFrames",
    "LatentSpace",
    "MaskedLatents",
    "PretrainedText",
    "TextConditioner",
    "TextPart",
    "TextToVideo",
    "TimeZeroConditioning",
    "Unconditional",
    "VideoEditing",
]
