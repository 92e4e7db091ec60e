"""Memory that operations hold, on any device: what a step's forward and backward passes need."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention


@contextmanager
def fused_attention() -> Iterator[None]:
    """Replace attention by the fused kernel, which the meta device would not choose. Masks do not
    change its cost.

    A ``TorchFunctionMode`` would not reach what checkpointing computes again.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return _ATTENTION(query, key, value)[0]

    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


class LiveMemory(TorchDispatchMode):
    """Tracks the bytes of all storages that operations make and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Free each parameter's gradient as soon as it is there: states are counted apart."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [p for p in module.parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(free) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
