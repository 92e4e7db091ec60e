"""The patch discriminator of pix2pix (Isola et al., arXiv 1611.07004) in three dimensions."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sora_lightning.configuration import KeepsArguments


class PatchDiscriminator3d(KeepsArguments, nn.Module):
    """``len(widths)`` convolutions that halve space (and time, if there is any), then one logit for
    each position: above 0 for real, below 0 for reconstructed.

    There are no norms, since one over a batch would let clips see each other. ``spectral`` keeps
    the largest singular value of every convolution at 1 (Miyato et al., arXiv 1802.05957), which R1
    does not need. Sides are at least ``2^len(widths)`` pixels.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256), spectral: bool = False):
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths = {list(widths)}: needs one positive width at least")
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv3d(narrow, wide, (3, 4, 4), 2, 1), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv3d(widths[-1], 1, 3, padding=1))
        if spectral:
            layers = [spectral_norm(x) if isinstance(x, nn.Conv3d) else x for x in layers]
        self.layers = nn.Sequential(*layers)
        self.least_side = 2 ** len(widths)

    def forward(self, video: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 1 f h w"]:
        """Return the logits. Raises ``ValueError`` for frames that are too small."""
        if min(video.shape[3:]) < self.least_side:
            raise ValueError(
                f"frames of {tuple(video.shape[3:])}: a discriminator of this many widths needs "
                f"{self.least_side} pixels a side"
            )
        return self.layers(video)
