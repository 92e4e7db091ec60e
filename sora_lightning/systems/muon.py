"""Muon for weight matrices and convolutions, AdamW for everything else, under one learning rate.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises each matrix's momentum;
the factor ``0.2 sqrt(max(rows, columns))`` makes the update as large as AdamW's (arXiv 2502.16982,
section 2.2), so that one rate and one schedule serve both. ``torch.optim.Muon`` is the same for
two-dimensional weights alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# The quintic whose iteration pulls singular values towards 1 fastest (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(
    matrices: Float[Tensor, "*batch rows columns"], num_iterations: int = 5
) -> Float[Tensor, "*batch rows columns"]:
    """The same singular vectors, and all singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    # bfloat16 is enough, and faster where there is hardware for it.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices)


class MuonAdamW(Optimizer):
    """Groups with ``is_matrix=True`` take Muon's step, with all but the first axis of a weight
    flattened.

    ``systems.optimization.parameter_groups`` makes the groups; a plain list of parameters is split
    by the number of axes. Weight decay is decoupled and acts on matrices alone.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if lr <= 0:
            raise ValueError(f"lr = {lr} must be positive")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum} must lie in [0, 1)")
        given = list(params)
        plain = [p for p in given if isinstance(p, Tensor)]
        groups = [g for g in given if isinstance(g, dict)] or [
            {"params": [p for p in plain if p.ndim >= 2], "is_matrix": True},
            {"params": [p for p in plain if p.ndim < 2], "is_matrix": False},
        ]
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "is_matrix": False,
        }
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if group["is_matrix"]:
                self._muon(with_grad, group)
            elif with_grad:
                self._adamw(with_grad, group)
        return loss

    def _muon(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        """Weights of one shape go through the iteration together: many are small."""
        of_shape: dict[torch.Size, list[Parameter]] = {}
        for parameter in parameters:
            of_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        for shape, alike in of_shape.items():
            updates = orthogonalise(
                torch.stack([self._nesterov(p, group["momentum"]).flatten(1) for p in alike])
            )
            scale = 0.2 * max(shape) ** 0.5
            for parameter, update in zip(alike, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter.grad)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)

    def _adamw(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
