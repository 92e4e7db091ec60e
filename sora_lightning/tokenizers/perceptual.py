"""LPIPS, the perceptual distance of two images (Zhang et al., arXiv 1801.03924, version 0.1):
channels of unit length after five layers of VGG-16, squared differences weighed by fitted heads,
mean over positions.
"""

from pathlib import Path

import torch
import torchmetrics
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

# Widths of VGG-16's convolutions, stage by stage (arXiv 1409.1556, table 1, D).
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Statistics of the images that the network was trained on, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST_SIDE = 2 ** (len(_STAGES) - 1)


class PerceptualDistance(nn.Module):
    """Mean LPIPS over a clip's frames, a differentiable loss between pixels in [-1, 1].

    The heads come with torchmetrics; the weights of VGG-16, without its classifier, from a file
    under torchvision's names. The network is frozen. Raises ``ValueError`` for a file that is
    missing or holds something else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path | str):
        super().__init__()
        path = Path(weights)
        if not path.is_file():
            raise ValueError(f"weights of VGG-16 for LPIPS: no such file: {path}")
        self.stages = _vgg16()
        self._load(path)
        folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
        heads = torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)
        for number in range(len(_STAGES)):
            self.register_buffer(f"head{number}", heads[f"lin{number}.model.1.weight"][0, :, 0, 0])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(
        self, reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, " b"]:
        """Return the distance, 0 for equal clips. Sides are at least ``LEAST_SIDE`` pixels."""
        if min(video.shape[3:]) < LEAST_SIDE:
            raise ValueError(f"frames of {tuple(video.shape[3:])}: LPIPS needs {LEAST_SIDE} pixels")
        frames = [rearrange(v, "b c F H W -> (b F) c H W") for v in (reconstruction, video)]
        x, y = ((v - self.shift) / self.scale for v in frames)
        total = torch.zeros(len(x), device=x.device)
        for number, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)
            apart = (_unit(x) - _unit(y)).square()
            weighed = torch.einsum("bchw, c -> bhw", apart, self.get_buffer(f"head{number}"))
            total = total + reduce(weighed, "b h w -> b", "mean")
        return reduce(total, "(b F) -> b", "mean", b=len(video))

    def _load(self, path: Path) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        given = {
            name.removeprefix("features."): tensor
            for name, tensor in content.items()
            if not name.startswith("classifier.")
        }
        own = dict(_numbered(self.stages))
        wrong = sorted(set(given) ^ set(own))
        wrong = wrong or [name for name in own if given[name].shape != own[name].shape]
        if wrong:
            raise ValueError(f"{path}: is no VGG-16 of torchvision's names: see {wrong[0]}")
        for name, parameter in own.items():
            parameter.data.copy_(given[name])


def _vgg16() -> nn.Sequential:
    """Return five stages, each ending in a layer that LPIPS compares; all but the first start with
    pooling."""
    stages, width = [], 3
    for number, widths in enumerate(_STAGES):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for wider in widths:
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages)


def _numbered(stages: nn.Sequential) -> list[tuple[str, nn.Parameter]]:
    """Return parameters under torchvision's names, which number all layers in one sequence."""
    layers = [layer for stage in stages for layer in stage]  # type: ignore[attr-defined]
    return [
        (f"{number}.{name}", parameter)
        for number, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    ]


def _unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-8)
