"""Conditioners and frame tasks: what the denoiser is told."""

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.conditioning.images import ClipEncoder, GlobalEncoder, PictureEncoder
from sora_lightning.conditioning.known_frames import (
    Concatenation,
    GivenChannels,
    MaskedLatents,
    PictureAndPlaces,
)
from sora_lightning.conditioning.labels import LabelConditioner
from sora_lightning.conditioning.masks import (
    NUM_DRAWS,
    BothEnds,
    FirstFrames,
    FrameTask,
    LastFrames,
    OutsideBox,
    Source,
    TextToVideo,
    check_tasks,
    draw_known,
)
from sora_lightning.conditioning.text import TextConditioner, Unconditional

__all__ = [
    "NUM_DRAWS",
    "BothEnds",
    "ClipEncoder",
    "Concatenation",
    "Conditioner",
    "FirstFrames",
    "FrameTask",
    "GivenChannels",
    "GlobalEncoder",
    "LabelConditioner",
    "LastFrames",
    "MaskedLatents",
    "OutsideBox",
    "PictureAndPlaces",
    "PictureEncoder",
    "Source",
    "TextConditioner",
    "TextToVideo",
    "Unconditional",
    "check_tasks",
    "draw_known",
]
