"""A discriminator's part in a tokenizer's training, in one loss and one backward pass (VQGAN, arXiv
2012.09841, section 3.1; latent diffusion trains its KL autoencoders the same way).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from sora_lightning.tokenizers.discriminator import PatchDiscriminator3d

# Bounds of the adaptive weight, and what keeps it finite (latent diffusion's code).
_GREATEST_WEIGHT, _LEAST_NORM = 1e4, 1e-4
Mean = Callable[[Tensor], Tensor]


class Adversarial(nn.Module):
    """Hinge losses for both sides.

    The tokenizer is judged by the discriminator with its weights held fast, the discriminator by
    detached reconstructions: no gradient of one side reaches the other, so that a single backward
    pass gives what two give.

    Args:
        discriminator: By default ``PatchDiscriminator3d``.
        weight: Of the tokenizer's side, beside the loss of reconstruction.
        adaptive: Multiply that weight by the ratio of the gradients of the reconstruction and of
            the tokenizer's side in the decoder's last layer.
        start_step: Optimiser steps of reconstruction alone, before either side plays.
        r1: Weight of the squared gradient of the discriminator at real clips, R1 with ``gamma / 2``
            (Mescheder et al., arXiv 1801.04406); 0 for none.
        learning_rate: Of the discriminator, at the top of the schedule; its betas are those of
            latent diffusion, 0.5 and 0.9.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator3d | None = None,
        weight: float = 0.5,
        adaptive: bool = True,
        start_step: int = 0,
        r1: float = 0.0,
        learning_rate: float = 1e-4,
    ):
        super().__init__()
        for name, value in (("weight", weight), ("r1", r1), ("start_step", start_step)):
            if value < 0:
                raise ValueError(f"{name} = {value} must not be negative")
        if learning_rate <= 0:
            raise ValueError(f"learning_rate = {learning_rate} must be positive")
        self.discriminator = discriminator or PatchDiscriminator3d()
        self.weight = weight
        self.adaptive = adaptive
        self.start_step = start_step
        self.r1 = r1
        self.learning_rate = learning_rate

    def parameter_group(self) -> dict[str, Any]:
        """The discriminator's, for an optimiser: it is not orthogonalised, since its steps have to
        stay as small as its gradients.
        """
        return {
            "params": list(self.parameters()),
            "is_matrix": False,
            "lr": self.learning_rate,
            "betas": (0.5, 0.9),
            "weight_decay": 0.0,
        }

    def forward(
        self,
        loss: Float[Tensor, ""],
        reconstruction: Float[Tensor, "b 3 F H W"],
        video: Float[Tensor, "b 3 F H W"],
        last_layer: Tensor | None,
        step: int,
        mean_over_ranks: Mean = lambda x: x,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """What to add to ``loss``, the loss of reconstruction, and the unweighted terms by name.

        ``last_layer`` is the weight in which an adaptive weight compares gradients, ``step`` the
        number of optimiser steps made. Before ``start_step`` it is a 0 on which every weight
        depends, as distributed training wants it.
        """
        if step < self.start_step:
            return torch.stack([0 * p.sum() for p in self.parameters()]).sum(), {}
        generator = self.generator_loss(reconstruction)
        weight = torch.as_tensor(self.weight, device=loss.device)
        if self.adaptive:
            assert last_layer is not None
            weight = weight * self._ratio(loss, generator, last_layer, mean_over_ranks)
        discriminator, terms = self.discriminator_loss(reconstruction, video)
        terms |= {"generator": generator.detach(), "adversarial_weight": weight}
        return weight * generator + discriminator, terms

    def generator_loss(self, reconstruction: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        """The less real a reconstruction looks, the higher. No gradient reaches the
        discriminator.
        """
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, fixed, (reconstruction,)).mean()

    def discriminator_loss(
        self, reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Hinge loss with R1, and its terms. No gradient reaches the reconstruction."""
        real_video = video.detach().requires_grad_(self.r1 > 0)
        real = self.discriminator(real_video)
        made = self.discriminator(reconstruction.detach())
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
        terms = {"discriminator": loss.detach(), "real": real.detach().mean()}
        terms["made"] = made.detach().mean()
        if self.r1:
            (slope,) = torch.autograd.grad(real.sum(), real_video, create_graph=True)
            terms["r1"] = slope.square().flatten(1).sum(1).mean()
            loss = loss + 0.5 * self.r1 * terms["r1"]
            terms["r1"] = terms["r1"].detach()
        return loss, terms

    @staticmethod
    def _ratio(
        loss: Tensor, generator: Tensor, last_layer: Tensor, mean_over_ranks: Mean
    ) -> Float[Tensor, ""]:
        """Of the norms of both gradients, each the mean over all ranks."""
        norms = [
            mean_over_ranks(torch.autograd.grad(side, last_layer, retain_graph=True)[0]).norm()
            for side in (loss, generator)
        ]
        return (norms[0] / (norms[1] + _LEAST_NORM)).clamp(0, _GREATEST_WEIGHT).detach()


def clip_grad_norm_per_module(
    sides: Iterable[Iterable[nn.Parameter]], value: float, algorithm: str | None
) -> None:
    """Clip the gradients of each side by its own norm (or each value, by ``algorithm = "value"``),
    so that neither side's gradients shrink the other's.
    """
    for parameters in sides:
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, value)
        else:
            nn.utils.clip_grad_norm_(parameters, value)
