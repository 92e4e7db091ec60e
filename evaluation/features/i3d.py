"""I3D, the network of the Fréchet video distance.

Inception is inflated to three dimensions (Carreira and Zisserman, 2017), and its 400 logits are the
features (Unterthiner et al., 2018). Submodules are named as in the public PyTorch weights;
``i3d_keys`` converts other names.
"""

from __future__ import annotations

import torch
from einops import reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.extractor import Extractor, drawn, fill
from evaluation.features.i3d_keys import to_pytorch
from evaluation.features.resize import Filter, Fit, to_square
from evaluation.features.weights import digest_of, locate_torchscript

# Input channels, and output channels of b0, b1a, b1b, b2a, b2b, b3b.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
# Git's object ids of the converted network that FVD was published with.
PUBLISHED = ("git:a867b87ac3a9097d200598b1d48a1b890d8ec744",)
PUBLISHED_TORCHSCRIPT = ("git:93daef59c7ae0e9e8f76225521407e60cbafa6aa",)

Triple = tuple[int, int, int]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Number of zeros before and after, by TensorFlow's SAME padding.

    There are ceil(size / stride) outputs, and an odd zero is placed after.
    """
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def pad_same(
    x: Float[Tensor, "b c f h w"], kernel: Triple, stride: Triple
) -> Float[Tensor, "b c f2 h2 w2"]:
    # F.pad expects the last axis first.
    sizes = zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True)
    return F.pad(x, [n for axis in sizes for n in same_padding(*axis)])


class Unit(nn.Module):
    """Convolution, batch norm and ReLU, with SAME padding."""

    def __init__(
        self, fan_in: int, fan_out: int, kernel: int, stride: int = 1, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(fan_in, fan_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(fan_out, eps=eps)
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c2 f2 h2 w2"]:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class MaxPool(nn.Module):
    """Max pooling with SAME padding. Zeros are exact, since inputs are never negative."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f2 h2 w2"]:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four parallel branches: 1³; 1³ and 3³; 1³ and 3³; pool 3³ and 1³."""

    def __init__(self, fan_in: int, widths: tuple[int, ...], eps: float) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(fan_in, b0, 1, eps=eps)
        self.b1a, self.b1b = Unit(fan_in, b1a, 1, eps=eps), Unit(b1a, b1b, 3, eps=eps)
        self.b2a, self.b2b = Unit(fan_in, b2a, 1, eps=eps), Unit(b2a, b2b, 3, eps=eps)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit(fan_in, b3b, 1, eps=eps)

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c2 f h w"]:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, dim=1)


class _Logits(nn.Module):
    def __init__(self, fan_in: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(fan_in, num_classes, 1)

    def forward(self, x: Float[Tensor, "b c f 1 1"]) -> Float[Tensor, "b k f 1 1"]:
        return self.conv3d(x)


class InceptionI3D(nn.Module):
    """The network: pixels in [-1, 1] to logits, for at least 9 frames of 193 x 193 pixels."""

    def __init__(self, num_classes: int = 400, batch_norm_eps: float = 1e-3) -> None:
        super().__init__()
        eps = batch_norm_eps
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2, eps=eps)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1, eps=eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3, eps=eps)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        for name, (fan_in, widths) in MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, Mixed(fan_in, widths, eps))
        self.logits = _Logits(1024, num_classes)

    def forward(self, x: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b k"]:
        for name, part in self.named_children():
            if name != "logits":
                x = part(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return reduce(self.logits(x), "b k f 1 1 -> b k", "mean")


class I3D(Extractor):
    """The 400 logits of videos resized to 224 x 224.

    Args:
        weights: ``random``, a path, a URL, or ``env:NAME``.
        digest: Expected hash of the file, ``sha256:...`` or ``git:...``. Scores are named ``fvd``
            only with the published one.
        batch_norm_eps: 1e-3 in the published graph; several ports have 1e-5, which changes logits
            by about 5 %.
        filter: Filter for resizing frames.
        fit: ``squash`` changes the aspect ratio, ``cover`` crops the sides.
    """

    kind = "i3d"
    feature_dim = 400
    least_frames = 9

    def __init__(
        self,
        weights: str,
        digest: str = "",
        batch_norm_eps: float = 1e-3,
        filter: Filter = "bilinear",
        fit: Fit = "squash",
    ) -> None:
        super().__init__()
        if not batch_norm_eps > 0:
            raise ValueError(f"batch_norm_eps = {batch_norm_eps}: must be positive")
        self.network = drawn(lambda: InceptionI3D(batch_norm_eps=batch_norm_eps))
        self.standing = fill(self.network, weights, digest, PUBLISHED, to_pytorch)
        self.filter, self.fit = filter, fit
        self.settings = {"batch_norm_eps": batch_norm_eps, "filter": filter, "fit": fit}
        self.freeze()

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 400"]:
        self.check(videos)
        pixels = to_square(videos, 224, self.filter, self.fit)
        return self.network(pixels / 127.5 - 1)


class TorchScriptI3D(Extractor):
    """The TorchScript file used by StyleGAN-V and others, which resizes frames itself.

    The file contains code, so it is run only if ``digest`` is given and matches.
    """

    kind = "i3d-torchscript"
    feature_dim = 400
    least_frames = 9

    def __init__(self, weights: str, digest: str = PUBLISHED_TORCHSCRIPT[0]) -> None:
        super().__init__()
        path = locate_torchscript(weights, digest)
        self.network = torch.jit.load(str(path), map_location="cpu")
        self.standing = "" if digest in PUBLISHED_TORCHSCRIPT else "unverified"
        self.settings = {"filter": "its own"}
        self.eval().requires_grad_(False)
        self.sha256 = digest_of(path).removeprefix("sha256:")

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 400"]:
        self.check(videos)
        return self.network(videos.float(), rescale=True, resize=True, return_features=True)
