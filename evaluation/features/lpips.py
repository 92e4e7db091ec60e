"""LPIPS, a perceptual distance of images (Zhang et al., 2018, version 0.1).

Activations of five layers of a classification network are normalised over channels. Their squared
differences are weighted by heads fitted to human judgements, summed over layers, and averaged over
positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torchmetrics
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaluation.features.extractor import drawn, fill
from evaluation.features.weights import read_weights, weights_sha256

Backbone = Literal["alex", "vgg"]
# Layers in torchvision's order: convolutions as (out, kernel, stride, padding), each followed by
# its ReLU; pools as (kernel, stride). "tap" marks a ReLU whose output is compared.
_ALEX: tuple[Any, ...] = (
    *((64, 11, 4, 2), "tap", (3, 2), (192, 5, 1, 2), "tap", (3, 2)),
    *((384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap"),
)
_VGG: tuple[Any, ...] = tuple(
    part
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for part in (*[(width, 3, 1, 1), ""] * (depth - 1), (width, 3, 1, 1), "tap", (2, 2))
)[:-1]
_LAYERS = {"alex": _ALEX, "vgg": _VGG}
_LEAST_SIDE = {"alex": 31, "vgg": 16}
# torchvision's file names end with the first digits of their sha256.
PUBLISHED = {"alex": "sha256:7be5be79", "vgg": "sha256:397923af"}
# Statistics of the training images, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """LPIPS between videos, frame by frame. The heads come with torchmetrics.

    Args:
        weights: Weights of the classification network: ``random``, or torchvision's file by path,
            URL or ``env:NAME``.
        digest: Expected hash of the file. Scores are named ``lpips-alex`` or ``lpips-vgg`` only
            with the published one.
        backbone: ``alex``, which most papers report, or ``vgg``.
    """

    def __init__(self, weights: str, digest: str = "", backbone: Backbone = "alex") -> None:
        super().__init__()
        if backbone not in _LAYERS:
            raise ValueError(f"backbone = {backbone!r}: must be one of {', '.join(_LAYERS)}")
        self.backbone = backbone
        self.least_side = _LEAST_SIDE[backbone]
        self.features, self.taps = drawn(lambda: _network(_LAYERS[backbone]))
        known = (digest,) if digest.startswith(PUBLISHED[backbone]) else ()
        self.standing = fill(self.features, weights, digest, known, _without_classes)
        heads = _heads(backbone)
        self.heads = nn.ParameterList(heads[f"lin{i}.model.1.weight"] for i in range(5))
        self.eval().requires_grad_(False)
        self.sha256 = weights_sha256(self)

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
        frames, others = (rearrange(v, "b c F H W -> (b F) c H W") for v in (real, other))
        return reduce(self.distances(frames, others), "(b F) -> b", "mean", b=len(real))

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError`` for frames too small for the network."""
        if min(height, width) < self.least_side:
            raise ValueError(
                f"clips of {height}x{width} pixels: lpips-{self.backbone} needs {self.least_side}"
            )

    def distances(
        self, frames: UInt8[Tensor, "b 3 H W"], others: UInt8[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        sides = self._activations(frames), self._activations(others)
        total = frames.new_zeros(len(frames), dtype=torch.float32)
        for x, y, head in zip(*sides, self.heads, strict=True):
            weighed = torch.einsum("bchw,ocij->bhw", (x - y).square(), head)
            total = total + reduce(weighed, "b h w -> b", "mean")
        return total

    def _activations(self, frames: UInt8[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b c h w"]]:
        """Activations of the compared layers, normalised over channels."""
        shift, scale = (
            torch.tensor(values, device=frames.device)[:, None, None] for values in (_SHIFT, _SCALE)
        )
        x = (frames.float() / 127.5 - 1 - shift) / scale
        activations = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                length = x.square().sum(dim=1, keepdim=True).add(1e-8).sqrt()
                activations.append(x / length)
        return activations


def _without_classes(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's convolutions under the names of the layers."""
    return {
        name.removeprefix("features."): value
        for name, value in content.items()
        if not name.startswith("classifier.")
    }


def _network(layers: tuple[Any, ...]) -> tuple[nn.Sequential, set[int]]:
    """The layers under torchvision's numbers, and the indices of those that are compared."""
    built: list[nn.Module] = []
    taps = set()
    width = 3
    for layer in layers:
        if isinstance(layer, str):
            if layer == "tap":
                taps.add(len(built))
            built.append(nn.ReLU())
        elif len(layer) == 2:
            built.append(nn.MaxPool2d(*layer))
        else:
            built.append(nn.Conv2d(width, *layer))
            width = layer[0]
    return nn.Sequential(*built), taps


def _heads(backbone: str) -> dict[str, Tensor]:
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    return read_weights(folder / f"{backbone}.pth")
