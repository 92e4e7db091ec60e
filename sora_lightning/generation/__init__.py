"""Prompts and frames to videos."""

from sora_lightning.generation.generator import (
    Draft,
    Guide,
    KnownFrames,
    VideoGenerator,
    generate,
    seeded_noise,
)
from sora_lightning.generation.tasks import (
    connect,
    edit,
    extend,
    extend_backward,
    inpaint,
    instruct,
    loop,
)

__all__ = [
    "Draft",
    "Guide",
    "KnownFrames",
    "VideoGenerator",
    "connect",
    "edit",
    "extend",
    "extend_backward",
    "generate",
    "inpaint",
    "instruct",
    "loop",
    "seeded_noise",
]
