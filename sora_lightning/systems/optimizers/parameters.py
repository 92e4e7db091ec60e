"""Arguments of optimizers: factories and parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW at 1e-4 without decay, as DiT trains; the default of systems."""
    return AdamW(parameters, lr=1e-4, weight_decay=0.0)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: weights of linear and convolutional layers
    (``is_matrix``), and all others.

    Only the first is decayed, and only the first may be orthogonalised. The others are gains,
    biases and tables, whose rows are vectors by themselves: embeddings, learned positions and
    tokens, relative biases, adaLN tables.
    """
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd))
    weights = {id(layer.weight) for layer in layers}
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in weights]
    others = [p for p in trainable if id(p) not in weights]
    return [
        {"params": matrices, "is_matrix": True},
        {"params": others, "is_matrix": False, "weight_decay": 0.0},
    ]


def has_gradients(optimizers: Iterable[Optimizer]) -> bool:
    """Return False after a step that was skipped, which leaves no gradient."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return any(p.grad is not None for group in groups for p in group["params"])
