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

# The quintic whose iteration pulls singular values towards 1 fastest (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(
    matrix: Float[Tensor, "rows columns"], num_iterations: int = 5
) -> Float[Tensor, "rows columns"]:
    """The nearest matrix with all singular values near 1, between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    # bfloat16 is enough, and faster where there is hardware for it.
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix)


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
        groups = list(params)
        if groups and isinstance(groups[0], Tensor):
            groups = [
                {"params": [p for p in groups if p.ndim >= 2], "is_matrix": True},
                {"params": [p for p in groups if p.ndim < 2], "is_matrix": False},
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
            update = self._muon if group["is_matrix"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(state["momentum"], group["momentum"])
        update = orthogonalise(nesterov.flatten(1))
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _adamw(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(grad)
            state["second"] = torch.zeros_like(grad)
        state["step"] += 1
        beta_1, beta_2 = group["betas"]
        state["first"].lerp_(grad, 1 - beta_1)
        state["second"].lerp_(grad.square(), 1 - beta_2)
        first = state["first"] / (1 - beta_1 ** state["step"])
        second = state["second"] / (1 - beta_2 ** state["step"])
        parameter.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))
