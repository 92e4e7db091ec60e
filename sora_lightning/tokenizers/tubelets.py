"""Linear tubelet embedding (ViViT, arXiv 2103.15691, section 3.2) and its inverse."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.types import Compression


class LinearTubelets(nn.Module):
    """A linear autoencoder from each box of ``compression`` pixels to a latent vector.

    The best linear autoencoder is the principal subspace of the boxes, which gradient descent finds
    in a few hundred steps; convolutions then learn a correction to sharp frames. The encoder is
    orthogonal at first, and the decoder its transpose. It is causal: copies of the first frame fill
    its box, so it is encoded alone, unless ``alone`` is False for a piece that continues a video.
    """

    def __init__(self, compression: Compression, latent_channels: int):
        super().__init__()
        self.compression = compression
        values = 3 * compression.frames * compression.height * compression.width
        if latent_channels > values:
            raise ValueError(
                f"latent_channels = {latent_channels}: a box of {compression} holds only {values} "
                "values"
            )
        self.inward = nn.Linear(values, latent_channels)
        self.outward = nn.Linear(latent_channels, values)
        nn.init.orthogonal_(self.inward.weight)
        self.outward.weight.data.copy_(self.inward.weight.data.mT)
        nn.init.zeros_(self.inward.bias)
        nn.init.zeros_(self.outward.bias)

    def encode(
        self, video: Float[Tensor, "b 3 F H W"], alone: bool = True
    ) -> Float[Tensor, "b c f h w"]:
        p, q, r = self.compression.frames, self.compression.height, self.compression.width
        padded = F.pad(video, (0, 0, 0, 0, p - 1, 0), mode="replicate") if alone else video
        boxes = rearrange(padded, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=p, q=q, r=r)
        return rearrange(self.inward(boxes), "b f h w c -> b c f h w")

    def decode(
        self, latents: Float[Tensor, "b c f h w"], alone: bool = True
    ) -> Float[Tensor, "b 3 F H W"]:
        p, q, r = self.compression.frames, self.compression.height, self.compression.width
        boxes = self.outward(rearrange(latents, "b c f h w -> b f h w c"))
        video = rearrange(boxes, "b f h w (c p q r) -> b c (f p) (h q) (w r)", p=p, q=q, r=r)
        return video[:, :, p - 1 :] if alone else video
