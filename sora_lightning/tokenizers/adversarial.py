"""Adversarial training of a tokenizer in one loss and one backward pass (VQGAN, arXiv 2012.09841,
section 3.1; latent diffusion trains its KL autoencoders so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from sora_lightning.checks import require_at_least, require_positive
from sora_lightning.configuration import KeepsArguments
from sora_lightning.tokenizers.discriminator import PatchDiscriminator3d

# Bounds of the adaptive weight, and what keeps it finite (latent diffusion's code).
_GREATEST_WEIGHT, _LEAST_NORM = 1e4, 1e-4
Mean = Callable[[Tensor], Tensor]


class Adversarial(KeepsArguments, nn.Module):
    """Hinge losses for both sides.

    The tokenizer's loss takes the discriminator with frozen weights, the discriminator's takes
    detached reconstructions. No gradient of one reaches the other, so one backward pass suffices.

    Args:
        discriminator: By default ``PatchDiscriminator3d``.
        weight: Weight of the tokenizer's adversarial loss.
        adaptive: Multiply that weight by the ratio of the gradients of the reconstruction and of
            the adversarial loss in the decoder's last layer.
        start_step: Number of optimizer steps before the adversarial losses begin.
        r1: Weight of the squared gradient of the discriminator at real clips, R1 with ``gamma / 2``
            (Mescheder et al., arXiv 1801.04406); 0 for none.
        learning_rate: Highest learning rate of the discriminator; its betas are those of latent
            diffusion, 0.5 and 0.9.
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
        require_at_least(0, weight=weight, r1=r1, start_step=start_step)
        require_positive(learning_rate=learning_rate)
        self.discriminator = discriminator or PatchDiscriminator3d()
        self.weight = weight
        self.adaptive = adaptive
        self.start_step = start_step
        self.r1 = r1
        self.learning_rate = learning_rate

    def parameter_group(self) -> dict[str, Any]:
        """Return the discriminator's group for an optimizer. It is not orthogonalised, since its
        steps must stay as small as its gradients.
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
        """Return what to add to ``loss`` (that of the reconstruction), and the unweighted terms by
        name.

        An adaptive weight compares gradients in the weight ``last_layer``. ``step`` is the number
        of optimizer steps so far. Before ``start_step`` the result is a 0 that depends on every
        weight, as distributed training requires.
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
        """Return the tokenizer's hinge loss. No gradient reaches the discriminator."""
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, fixed, (reconstruction,)).mean()

    def discriminator_loss(
        self, reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the hinge loss with R1, and its terms. No gradient reaches the reconstruction."""
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
        """Return the ratio of the norms of both gradients, each the mean over all ranks."""
        norms = [
            mean_over_ranks(torch.autograd.grad(side, last_layer, retain_graph=True)[0]).norm()
            for side in (loss, generator)
        ]
        return (norms[0] / (norms[1] + _LEAST_NORM)).clamp(0, _GREATEST_WEIGHT).detach()


def clip_grad_norm_per_module(
    sides: Iterable[Iterable[nn.Parameter]], value: float, algorithm: str | None
) -> None:
    """Clip the gradients of each module by its own norm, or each value with ``algorithm =
    "value"``.
    """
    for parameters in sides:
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, value)
        else:
            nn.utils.clip_grad_norm_(parameters, value)
