"""From prompts and frames to videos."""

from sora_lightning.conditioning import KnownFrames
from sora_lightning.generation.generator import (
    InitLatents,
    VideoGenerator,
    WeakModel,
    seeded_noise,
)
from sora_lightning.generation.sampling_config import (
    SAMPLERS,
    GuidanceConfig,
    SamplerName,
    SamplingConfig,
    TimeGrid,
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
    "SAMPLERS",
    "GuidanceConfig",
    "InitLatents",
    "KnownFrames",
    "SamplerName",
    "SamplingConfig",
    "TimeGrid",
    "VideoGenerator",
    "WeakModel",
    "connect",
    "edit",
    "extend",
    "extend_backward",
    "inpaint",
    "instruct",
    "loop",
    "seeded_noise",
]
