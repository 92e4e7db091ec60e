"""LPIPS, a perceptual distance of images (Zhang et al., arXiv 1801.03924, version 0.1).

Activations of five layers of a classification network are normalised over channels. Their squared
differences are weighted by fitted heads, averaged over positions, and summed over layers.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torchmetrics
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.checks import naming, require_file
from sora_lightning.files import check_archive

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
LEAST_SIDE = {"alex": 31, "vgg": 16}
# Statistics of the training images, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LpipsNetwork(nn.Module):
    """LPIPS between images, frozen, with random weights of the backbone.

    ``features`` are the convolutions under torchvision's numbers; ``heads`` come with torchmetrics.
    Raises ``ValueError`` for an unknown backbone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone):
        super().__init__()
        if backbone not in _LAYERS:
            raise ValueError(f"backbone = {backbone!r}: must be one of {', '.join(_LAYERS)}")
        self.features, self.taps = _layers(_LAYERS[backbone])
        folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
        heads = torch.load(folder / f"{backbone}.pth", map_location="cpu", weights_only=True)
        self.heads = nn.ParameterList(heads[f"lin{i}.model.1.weight"] for i in range(5))
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], others: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        """Return the distances of images in [-1, 1]; 0 for equal images."""
        x, y = ((v - self.shift) / self.scale for v in (images, others))
        total, heads = torch.zeros(len(x), device=x.device), iter(self.heads)
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in self.taps:
                difference = (_normalised(x) - _normalised(y)).square()
                weighted = torch.einsum("bchw, c -> bhw", difference, next(heads)[0, :, 0, 0])
                total = total + reduce(weighted, "b h w -> b", "mean")
        return total


class PerceptualDistance(nn.Module):
    """LPIPS with VGG-16, averaged over a clip's frames: a differentiable loss, not trained itself.

    ``weights`` is a file of VGG-16 under torchvision's names; its classifier is ignored. Raises
    ``ValueError`` for a file that does not exist or holds something else.
    """

    def __init__(self, weights: Path | str):
        super().__init__()
        path = Path(weights)
        require_file("weights of VGG-16 for LPIPS:", path)
        self.network = LpipsNetwork("vgg")
        with naming(f"weights of VGG-16 for LPIPS: {path}:"):
            check_archive(path)
        content = without_classifier(torch.load(path, map_location="cpu", weights_only=True))
        own = self.network.features.state_dict()
        wrong = sorted(set(content) ^ set(own))
        wrong = wrong or [name for name in own if content[name].shape != own[name].shape]
        if wrong:
            raise ValueError(f"{path}: is no VGG-16 of torchvision's names: see {wrong[0]}")
        self.network.features.load_state_dict(content)

    def forward(
        self, reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, " b"]:
        """Return the distances of clips in [-1, 1]; 0 for equal clips.

        Raises ``ValueError`` for frames with a side below 16 pixels.
        """
        if min(video.shape[3:]) < (least := LEAST_SIDE["vgg"]):
            raise ValueError(f"frames of {tuple(video.shape[3:])}: LPIPS needs {least} pixels")
        frames = [rearrange(v, "b c F H W -> (b F) c H W") for v in (reconstruction, video)]
        return reduce(self.network(*frames), "(b F) -> b", "mean", b=len(video))


def without_classifier(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the convolutions of a torchvision file, named as in ``LpipsNetwork.features``."""
    return {
        name.removeprefix("features."): value
        for name, value in content.items()
        if not name.startswith("classifier.")
    }


def _layers(layers: tuple[Any, ...]) -> tuple[nn.Sequential, set[int]]:
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


def _normalised(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-8)
