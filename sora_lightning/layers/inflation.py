"""An image model's layers as a video model's first ones (ViViT, arXiv 2103.15691, section 3.4)."""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor


def central_frame(
    weight: Float[Tensor, "d p"], num_frames: int
) -> Float[Tensor, "d {num_frames}*p"]:
    """A patch's first layer for tubelets: the image's weights on frame ``num_frames // 2``, zero on
    the others (equation 9).
    """
    tubelet = torch.zeros(
        len(weight), num_frames, weight.shape[1], dtype=weight.dtype, device=weight.device
    )
    tubelet[:, num_frames // 2] = weight
    return tubelet.flatten(1)


def filter_inflation(
    weight: Float[Tensor, "d p"], num_frames: int
) -> Float[Tensor, "d {num_frames}*p"]:
    """The other way: the image's weights on every frame, each over their number (equation 8)."""
    return repeat(weight / num_frames, "d p -> d (f p)", f=num_frames)


def same_for_every_frame(parameter: Tensor, num_frames: int) -> Tensor:
    """Weight ``p d`` or bias ``p`` of a tubelet's last layer: every frame has the image's
    values.
    """
    return repeat(parameter, "p ... -> (f p) ...", f=num_frames)
