"""Inception for FID: the TorchScript file used by clean-fid, StyleGAN and others.

Frames are resized as in clean-fid (Parmar et al., 2022).
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaluation.features.extractor import RANDOM, Extractor, drawn
from evaluation.features.resize import resize
from evaluation.features.weights import digest_of, locate_torchscript

SIDE = 299


class Inception(Extractor):
    """2048 pooled features of single frames: videos of one frame.

    Frames are resized to 299 x 299 by a bicubic filter with antialiasing, in floating point and
    without rounding, which is clean-fid's ``clean`` mode.

    Args:
        weights: ``random``, or the TorchScript file ``inception-2015-12-05.pt`` by path, URL or
            ``env:NAME``.
        digest: Expected hash of the file. The file contains code, so it is not run without one.
        published: Whether that digest is the public file's, to be set by the protocol's author.
    """

    kind = "inception"
    feature_dim = 2048

    def __init__(self, weights: str, digest: str = "", published: bool = False) -> None:
        super().__init__()
        self.settings = {"filter": "bicubic-antialias", "side": SIDE}
        if weights == RANDOM:
            self.layers: nn.Module = drawn(_random_layers)
            self.standing = RANDOM
            self.freeze()
            return
        path = locate_torchscript(weights, digest)
        # Its first part normalises and resizes differently; clean-fid skips it too.
        self.layers = torch.jit.load(str(path), map_location="cpu").layers
        self.standing = "" if published else "unverified"
        self.eval().requires_grad_(False)
        self.sha256 = digest_of(path).removeprefix("sha256:")

    def features(self, videos: UInt8[Tensor, "b 3 1 H W"]) -> Float[Tensor, "b 2048"]:
        self.check(videos)
        if videos.shape[2] != 1:
            raise ValueError(f"clips of {videos.shape[2]} frames: Inception takes single frames")
        frames = resize(
            rearrange(videos, "b c 1 H W -> b c H W").float(), SIDE, SIDE, "bicubic-antialias"
        )
        return self.layers((frames - 128) / 128).flatten(1)


def _random_layers() -> nn.Module:
    """A small network with the right output width, for tests."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 8), nn.ReLU(), nn.Conv2d(64, 2048, 3, 4), nn.AdaptiveAvgPool2d(1)
    )
