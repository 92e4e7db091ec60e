"""Networks that extract features and embeddings for the scores."""

from evaluation.features.clip import Clip
from evaluation.features.extractor import Extractor, VideoTextExtractor
from evaluation.features.i3d import I3D, TorchScriptI3D
from evaluation.features.inception import Inception
from evaluation.features.lpips import Lpips
from evaluation.features.tiny import SavedTiny, TinyFile, TinyNetwork, load_tiny
from evaluation.features.videomae import VideoMAE, ViTSize

__all__ = [
    "I3D",
    "Clip",
    "Extractor",
    "Inception",
    "Lpips",
    "SavedTiny",
    "TinyFile",
    "TinyNetwork",
    "TorchScriptI3D",
    "ViTSize",
    "VideoMAE",
    "VideoTextExtractor",
    "load_tiny",
]
