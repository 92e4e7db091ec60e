"""LPIPS as a metric: the network of the training loss on uint8 videos, under a name that says its
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaluation.features.extractor import drawn, fill
from evaluation.features.weights import weights_sha256
from sora_lightning.tokenizers.perceptual import (
    LEAST_SIDE,
    Backbone,
    LpipsNetwork,
    without_classifier,
)

# torchvision's file names end with the first digits of their sha256.
PUBLISHED = {"alex": "sha256:7be5be79", "vgg": "sha256:397923af"}


class Lpips(nn.Module):
    """LPIPS between videos, averaged over frames.

    Args:
        weights: Weights of the classification network: ``random``, or torchvision's file by path,
            URL or ``env:NAME``.
        digest: Expected hash of the file. Scores are named ``lpips-alex`` or ``lpips-vgg`` only
            with the published one.
        backbone: ``alex``, which most papers report, or ``vgg``.
    """

    def __init__(self, weights: str, digest: str = "", backbone: Backbone = "alex") -> None:
        super().__init__()
        self.network = drawn(lambda: LpipsNetwork(backbone))
        self.backbone = backbone
        self.least_side = LEAST_SIDE[backbone]
        known = (digest,) if digest.startswith(PUBLISHED[backbone]) else ()
        self.standing = fill(self.network.features, weights, digest, known, without_classifier)
        self.sha256 = weights_sha256(self.network)

    @property
    def label(self) -> str:
        """Backbone, followed by ``standing`` if the weights are not the published ones."""
        return "-".join(filter(None, (self.backbone, self.standing)))

    def record(self) -> dict[str, Any]:
        """Everything that affects the distances."""
        return {"name": f"lpips-{self.label}", "sha256": self.sha256}

    def forward(
        self, real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, " b"]:
        """Mean over frames; 0 for equal videos.

        Raises ``ValueError`` for videos of different shapes or too small.
        """
        if real.shape != other.shape or real.dtype != torch.uint8 or other.dtype != torch.uint8:
            raise ValueError(
                f"videos of shapes {tuple(real.shape)} and {tuple(other.shape)}, types "
                f"{real.dtype} and {other.dtype}: must be uint8 of one shape"
            )
        self.check_size(*real.shape[3:])
        frames = [
            rearrange(v, "b c F H W -> (b F) c H W").float() / 127.5 - 1 for v in (real, other)
        ]
        return reduce(self.network(*frames), "(b F) -> b", "mean", b=len(real))

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError`` for frames too small for the network."""
        if min(height, width) < self.least_side:
            raise ValueError(
                f"clips of {height}x{width} pixels: lpips-{self.backbone} needs {self.least_side}"
            )
