"""How near a tokenizer's reconstruction is to the clip, frame by frame: PSNR, SSIM by torchmetrics,
and LPIPS where a network is given for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.features.lpips import Lpips
from evaluation.metrics.bank import RowBank

LEAST_SIDE = 11  # of SSIM's window


def psnr_per_clip(
    real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Peak signal to noise in dB, mean over frames. A frame without any error counts 100 dB, not
    infinity.
    """
    error = reduce((real.double() - other.double()).square(), "b c F H W -> b F", "mean")
    return (10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))).mean(dim=1)


def ssim_per_clip(
    real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Structural similarity, mean over frames: Gaussian window of deviation 1.5 (Wang et al.,
    2004), at most 1.
    """
    frames, others = (rearrange(v, "b c F H W -> (b F) c H W") / 255 for v in (real, other))
    ssim = structural_similarity_index_measure(frames, others, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return reduce(ssim, "(b F) -> b", "mean", b=len(real))


class Reconstruction(RowBank):
    """Means over clips of ``psnr`` (dB), ``ssim`` and, with a network for it, ``lpips`` under the
    network's name; each the mean over a clip's frames.
    """

    def __init__(self, perceptual: Lpips | None = None) -> None:
        super().__init__({"scores": 2 + (perceptual is not None)})
        self.perceptual = perceptual

    def update(
        self,
        real: UInt8[Tensor, "b 3 F H W"],
        other: UInt8[Tensor, "b 3 F H W"],
        ids: Sequence[int],
    ) -> None:
        """Note clips of one size; ids tell a clip from its copies. Sides are at least 11 pixels,
        for SSIM.
        """
        if real.shape != other.shape:
            raise ValueError(
                f"clips of shapes {tuple(real.shape)} and {tuple(other.shape)}: must be equal"
            )
        if min(real.shape[-2:]) < LEAST_SIDE:
            raise ValueError(
                f"clips of {real.shape[-2]}x{real.shape[-1]} pixels: SSIM needs {LEAST_SIDE}"
            )
        measures = [psnr_per_clip(real, other), ssim_per_clip(real, other)]
        if self.perceptual is not None:
            with torch.no_grad():
                measures.append(self.perceptual(real, other))
        self.add("scores", ids, torch.stack([m.double() for m in measures], dim=1))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """NaN before any clip came."""
        names = ["psnr", "ssim"]
        if self.perceptual is not None:
            names.append(f"lpips-{self.perceptual.label}")
        return dict(zip(names, self.rows("scores").mean(dim=0), strict=True))
