"""From a manifest of video files to batches of clips."""

from typing import TYPE_CHECKING, Any

from sora_lightning.data.batching.buckets import Assignment, Buckets, Removal, SizeFamily
from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.data.batching.packing import PackPlan
from sora_lightning.data.batching.sampler import BatchPlan
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import DecordReader, PyAVReader, Reader
from sora_lightning.data.decoding.shards import write_shards
from sora_lightning.data.decoding.subprocess_decoding import SubprocessReader
from sora_lightning.data.decoding.torchcodec_reader import TorchCodecReader
from sora_lightning.data.decoding.video_metadata import VideoMetadata
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest.captions import Captions
from sora_lightning.data.manifest.records import ClipRecord, read_manifest
from sora_lightning.data.settings import Batching, Reading
from sora_lightning.data.synthetic.render import write_dataset

if TYPE_CHECKING:
    from sora_lightning.data.datamodule import VideoDataModule

__all__ = [
    "Assignment",
    "BatchPlan",
    "Batching",
    "Buckets",
    "Captions",
    "ClipRecord",
    "DecodeError",
    "DecordReader",
    "LatentCache",
    "PackPlan",
    "Packing",
    "PyAVReader",
    "Reader",
    "Reading",
    "Removal",
    "SizeFamily",
    "SubprocessReader",
    "TorchCodecReader",
    "VideoDataModule",
    "VideoMetadata",
    "read_manifest",
    "write_dataset",
    "write_shards",
    "write_video",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and index, split and synthesize do not use it.
    if name == "VideoDataModule":
        from sora_lightning.data.datamodule import VideoDataModule

        return VideoDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
