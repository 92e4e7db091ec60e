"""Memory that operations hold, on any device: what a step's forward and backward passes need."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
# Functions that autocast on CUDA casts, by the lists of ATen/autocast_mode.h: inputs to the lower
# type, inputs to float32, the result to float32, and inputs to the widest type among them.
LOWER = {
    *("addbmm", "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d"),
    *("conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul", "mm", "mv"),
    *("prelu", "scaled_dot_product_attention", "scaled_dot_product_flash_attention"),
}
FLOAT32 = {
    *("acos", "asin", "cdist", "cosh", "cosine_similarity", "dist", "exp", "expm1", "group_norm"),
    *("huber_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2"),
    *("logsumexp", "mse_loss", "pow", "reciprocal", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss"),
    *("softplus", "tan"),
}
FLOAT32_RESULT = {"cumprod", "cumsum", "log_softmax", "prod", "softmax", "sum"}
WIDEST = {"addcdiv", "addcmul"}


@contextmanager
def fused_attention() -> Iterator[None]:
    """Replace attention by the fused kernel, which the meta device would not choose. Masks do not
    change its cost.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return _ATTENTION(query, key, value)[0]

    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Cast as ``torch.autocast`` to ``dtype`` does on CUDA, but on any device: the meta device has
    no autocast, and that of CPUs does not keep norms in float32. To float32 it is off, as there.
    """
    if dtype == torch.float32:
        yield
        return
    casts = _Casts(dtype)
    # A mode is off within the functions that it sees, such as a loss's backward.
    checkpoint = partial(
        torch.utils.checkpoint.checkpoint, context_fn=lambda: (nullcontext(), casts)
    )
    with casts, patch.object(torch.utils.checkpoint, "checkpoint", checkpoint):
        yield


class _Casts(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        if name in LOWER:
            args, kwargs = _cast((args, kwargs), self.dtype)
        elif name in FLOAT32:
            args, kwargs = _cast((args, kwargs), torch.float32)
        elif name in WIDEST:
            types_of = [tensor.dtype for tensor in _tensors((args, kwargs))]
            args, kwargs = _cast((args, kwargs), reduce(torch.promote_types, types_of))
        elif name in FLOAT32_RESULT and args[0].is_floating_point():
            kwargs = {"dtype": torch.float32, **kwargs}
        return func(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    return tree_map(cast, tree)


class LiveMemory(TorchDispatchMode):
    """Tracks the bytes of all storages that operations make and that are still referred to.

    Casts of parameters that train are not counted: they are among a training's states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _trains(args[0]):
            return result
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


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


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
