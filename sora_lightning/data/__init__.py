"""From a manifest of video files to batches of clips."""

from sora_lightning.data.buckets import Assignment, Buckets, Removal, SizeFamily
from sora_lightning.data.datamodule import VideoDataModule
from sora_lightning.data.decode import DecodeError, DecordReader, PyAVReader, Reader
from sora_lightning.data.encode import write_video
from sora_lightning.data.guard import GuardedReader
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest import ClipRecord, Footage, read_manifest
from sora_lightning.data.native import Packing
from sora_lightning.data.packing import PackPlan
from sora_lightning.data.sampler import BatchPlan
from sora_lightning.data.shards import write_shards
from sora_lightning.data.synthetic import write_dataset
from sora_lightning.data.torchcodec_reader import TorchCodecReader

__all__ = [
    "Assignment",
    "BatchPlan",
    "Buckets",
    "ClipRecord",
    "DecodeError",
    "DecordReader",
    "Footage",
    "GuardedReader",
    "LatentCache",
    "PackPlan",
    "Packing",
    "PyAVReader",
    "Reader",
    "Removal",
    "SizeFamily",
    "TorchCodecReader",
    "VideoDataModule",
    "read_manifest",
    "write_dataset",
    "write_shards",
    "write_video",
]
