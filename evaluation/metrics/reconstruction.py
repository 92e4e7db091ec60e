"""Frame-wise quality of a tokenizer's reconstructions: PSNR, SSIM and optionally LPIPS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.features.lpips import Lpips
from evaluation.metrics.bank import RowBank

LEAST_SIDE = 11  # the window of SSIM


def psnr_per_clip(
    real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB, averaged over frames.

    A frame without any error counts as 100 dB.
    """
    error = reduce((real.double() - other.double()).square(), "b c F H W -> b F", "mean")
    return (10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))).mean(dim=1)


def ssim_per_clip(
    real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Structural similarity, at most 1, averaged over frames.

    The window is Gaussian with a standard deviation of 1.5 (Wang et al., 2004). Raises
    ``ValueError`` for sides of fewer than 11 pixels.
    """
    check_side(*real.shape[-2:])
    frames, others = (rearrange(v, "b c F H W -> (b F) c H W") / 255 for v in (real, other))
    ssim = structural_similarity_index_measure(frames, others, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return reduce(ssim, "(b F) -> b", "mean", b=len(real))


def check_side(height: int, width: int) -> None:
    """Raise ``ValueError`` for frames smaller than the window of SSIM."""
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"clips of {height}x{width} pixels: SSIM needs {LEAST_SIDE}")


class Reconstruction(RowBank):
    """Means over clips of ``psnr`` (dB), ``ssim`` and, with a network, ``lpips-<network>``.

    Each value of a clip is the mean over its frames.
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
        """Add clips of one size, at least 11 pixels a side for SSIM; each id is counted once."""
        if real.shape != other.shape:
            raise ValueError(
                f"clips of shapes {tuple(real.shape)} and {tuple(other.shape)}: must be equal"
            )
        measures = [psnr_per_clip(real, other), ssim_per_clip(real, other)]
        if self.perceptual is not None:
            with torch.no_grad():
                measures.append(self.perceptual(real, other))
        self.add("scores", ids, torch.stack([m.double() for m in measures], dim=1))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means; NaN before the first update."""
        names = ["psnr", "ssim"]
        if self.perceptual is not None:
            names.append(f"lpips-{self.perceptual.label}")
        return dict(zip(names, self.rows("scores").mean(dim=0), strict=True))
