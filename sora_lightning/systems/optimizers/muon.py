"""Muon for weight matrices and convolutions, AdamW for everything else, under one learning rate.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises each matrix's momentum;
the factor ``0.2 sqrt(max(rows, columns))`` makes the update as large as AdamW's (arXiv 2502.16982,
section 2.2), so that one rate and one schedule serve both. ``torch.optim.Muon`` takes
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

from sora_lightning.checks import require_in, require_positive
from sora_lightning.systems.parallel import by_mesh, shared_out, whole

# The quintic whose iteration pulls singular values towards 1 fastest (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(
    matrices: Float[Tensor, "*batch rows columns"],
) -> Float[Tensor, "*batch rows columns"]:
    """Return matrices with the same singular vectors and singular values near 1.

    Values above about 1/500 of the Frobenius norm end between 0.68 and 1.21. Smaller ones, which a
    square Gaussian matrix has too, grow by the factor 3.4445^5 = 485 and stay below.
    """
    # bfloat16 is enough, and faster where there is hardware for it.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    rows, columns = x.shape[-2:]
    x = (x.mT if rows > columns else x).reshape(-1, min(rows, columns), max(rows, columns))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # On n x m the products of the first cost 2n^2 (10m + 5n), of the second 2n^2 (2m + 17n).
    # bfloat16 has too few digits for the second.
    is_long = 2 * max(rows, columns) > 3 * min(rows, columns)
    x = _iterate_gram(x) if is_long and x.dtype == torch.float32 else _iterate(x)
    return (x.mT if rows > columns else x).to(matrices).reshape(matrices.shape)


def _iterate(x: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
    """Apply ``X <- (a + b G + c G^2) X`` five times, with the Gram matrix ``G = X X^T``."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Float[Tensor, "b n m"]) -> Float[Tensor, "b n m"]:
    """Iterate on ``G`` alone, which commutes with every factor ``P = a + b G + c G^2``: ``G``
    becomes ``G P^2``, and the product of all factors is applied to ``X`` once.

    Rounding in ``G`` grows by ``a^2`` with each iteration: after five it moves the result by up to
    3e-4 of its norm in float32.
    """
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for i in range(NUM_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < NUM_ITERATIONS:
            gram = gram @ factor @ factor
    assert product is not None
    # In the layout of x: weights are then added to in the order of their memory.
    return product @ x if x.is_contiguous() else (x.mT @ product.mT).mT


class MuonAdamW(Optimizer):
    """Groups with ``is_matrix=True`` take Muon's step, with all but the first axis of a weight
    flattened.

    ``systems.optimizers.parameter_groups`` makes the groups; a plain list of parameters is split
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
        require_positive(lr=lr)
        require_in("[0, 1)", momentum=momentum)
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
            for alike in by_mesh(p for p in group["params"] if p.grad is not None):
                (self._muon if group["is_matrix"] else self._adamw)(alike, group)
        return loss

    def _muon(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        """Step; weights of one shape are orthogonalised together, since many are small. Each rank
        orthogonalises whole matrices where it holds shares of them.
        """
        directions = [whole(one) for one in self._nesterov(parameters, group["momentum"])]
        of_shape: dict[torch.Size, list[int]] = {}
        for i, direction in enumerate(directions):
            of_shape.setdefault(direction.flatten(1).shape, []).append(i)
        if group["weight_decay"]:
            torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
        for shape, alike in of_shape.items():
            updates = orthogonalise(torch.stack([directions[i].flatten(1) for i in alike]))
            scale = 0.2 * max(shape) ** 0.5
            for i, update in zip(alike, updates, strict=True):
                own = shared_out(update.reshape(parameters[i].shape), parameters[i])
                parameters[i].add_(own, alpha=-group["lr"] * scale)

    def _nesterov(self, parameters: list[Parameter], momentum: float) -> tuple[Tensor, ...]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, momenta, momentum)

    def _adamw(self, parameters: list[Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        on_cpu = parameters[0].device.type == "cpu"
        adamw(
            list(parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=not on_cpu,
            fused=on_cpu,  # elsewhere it would want the counts of steps on the device
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
