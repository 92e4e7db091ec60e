"""Captioners: videos to captions, and both to embeddings that can be compared."""

from sora_lightning.captioner.coca import CoCa
from sora_lightning.captioner.pretrained import PretrainedCaptioner
from sora_lightning.captioner.streams import EdgeStream, MotionStream
from sora_lightning.captioner.video_encoder import VideoEncoder

__all__ = ["CoCa", "EdgeStream", "MotionStream", "PretrainedCaptioner", "VideoEncoder"]
