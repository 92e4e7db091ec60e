"""FLOPs of whatever runs, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATTENTION = (
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "flash_attention_for_cpu",
)


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs within by the formulas of ``FlopCounterMode``; a fused attention's as those
    of its matrix products, forward and backward, as on the meta device.

    ``FlopCounterMode`` itself runs some operators as their decompositions, which changes the last
    bits of a result: a resumed training would no longer equal the uninterrupted one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = dict(flop_registry)
        for name in _ATTENTION:
            operator = f"_scaled_dot_product_{name}"
            self._formulas[getattr(torch.ops.aten, operator)] = _attention
            self._formulas[getattr(torch.ops.aten, f"{operator}_backward")] = _attention_backward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self._formulas.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * sdpa_flop_count(q.shape, k.shape, v.shape)
