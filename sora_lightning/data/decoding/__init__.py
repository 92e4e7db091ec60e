"""Decodes videos and images to frames as a player shows them."""

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import (
    DecordReader,
    PyAVReader,
    Reader,
    probe,
    read_frames,
)
from sora_lightning.data.decoding.timeline import Timeline, read_timeline
from sora_lightning.data.decoding.video_metadata import VideoMetadata

__all__ = [
    "DecodeError",
    "DecordReader",
    "PyAVReader",
    "Reader",
    "Timeline",
    "VideoMetadata",
    "probe",
    "read_frames",
    "read_timeline",
]
