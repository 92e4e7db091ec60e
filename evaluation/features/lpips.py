"""LPIPS: how different two pictures look, by a network for classes (Zhang et al., 2018, version
0.1): channels of unit length after five of its layers, their squared differences weighed by heads
that are fitted to what people said, summed over layers, mean over places.
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
# Layers as torchvision numbers them: convolutions as (out, kernel, stride, padding), each followed
# by its ReLU; pools as (kernel, stride). "tap" marks a ReLU whose values are compared.
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
# torchvision ends the names of its files with the beginning of their sha256.
PUBLISHED = {"alex": "sha256:7be5be79", "vgg": "sha256:397923af"}
# Of the pictures that the networks were trained on, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distances between videos, frame by frame. The heads come with torchmetrics.

    Args:
        weights: Of the network for classes: ``random``, or torchvision's file by path, URL or
            ``env:NAME``.
        digest: What the file must be. The published one makes the score's name ``lpips-alex`` or
            ``lpips-vgg``; any other, and none, a name of its own.
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
        """The network, and the standing of its weights where they are not the published ones."""
        return "-".join(filter(None, (self.backbone, self.standing)))

    def record(self) -> dict[str, Any]:
        """All that moves the distances."""
        return {"name": f"lpips-{self.label}", "sha256": self.sha256}

    def forward(
        self, real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, " b"]:
        """Mean over frames; 0 for equal videos. Raises ``ValueError`` for videos of two shapes or
        too small.
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
        """Raises ``ValueError`` for frames too small for the network."""
        if min(height, width) < self.least_side:
            raise ValueError(
                f"clips of {height}x{width} pixels: lpips-{self.backbone} needs {self.least_side}"
            )

    def distances(
        self, frames: UInt8[Tensor, "b 3 H W"], others: UInt8[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        sides = self._seen(frames), self._seen(others)
        total = frames.new_zeros(len(frames), dtype=torch.float32)
        for x, y, head in zip(*sides, self.heads, strict=True):
            weighed = torch.einsum("bchw,ocij->bhw", (x - y).square(), head)
            total = total + reduce(weighed, "b h w -> b", "mean")
        return total

    def _seen(self, frames: UInt8[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b c h w"]]:
        """What the compared layers give, each place's channels of length 1."""
        shift, scale = (
            torch.tensor(values, device=frames.device)[:, None, None] for values in (_SHIFT, _SCALE)
        )
        x = (frames.float() / 127.5 - 1 - shift) / scale
        seen = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                length = x.square().sum(dim=1, keepdim=True).add(1e-8).sqrt()
                seen.append(x / length)
        return seen


def _without_classes(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's convolutions under the names of the layers."""
    return {
        name.removeprefix("features."): value
        for name, value in content.items()
        if not name.startswith("classifier.")
    }


def _network(layers: tuple[Any, ...]) -> tuple[nn.Sequential, set[int]]:
    """The layers under torchvision's numbers, and the places of those that are compared."""
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
