"""FLOPs, parameters and live memory of a diffusion system, counted on the meta device.

Attention is counted as the fused kernel that a GPU runs: FLOPs of its two matrix products, and no
matrix of scores in memory. FLOPs of the backward pass are twice those of the forward pass, without
what the kernel computes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sora_lightning.cli.training_cost import condition_of_zeros
from sora_lightning.denoisers import Denoiser, DiT
from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser
from sora_lightning.denoisers.pretrained_transformers import VideoTransformer
from sora_lightning.flops import FlopCounter
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import VideoSize

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention


@dataclass(frozen=True)
class Count:
    """Cost of one clip; FLOPs are twice the multiply-accumulates, memory is in bytes.

    ``trained`` is the number of the denoiser's parameters that train, such as adapters'.
    ``activations`` is the peak of the denoiser's forward and backward passes beside
    weights and gradients, without activation checkpointing; ``checkpointed`` is an estimate with
    it. ``working_set`` is the peak of a forward pass without gradients.
    """

    tokens: int
    parameters: int
    trained: int
    tokenizer_parameters: int
    conditioner_parameters: int
    encode_flops: float
    decode_flops: float
    forward_flops: float
    backward_flops: float
    working_set: float
    activations: float
    checkpointed: float


def count(system: DiffusionSystem, size: VideoSize, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Count one clip of ``size``. ``system`` is built on the meta device and is cast to ``dtype``;
    its activation checkpointing is switched off.

    The text encoder's FLOPs are left out.

    Raises ``ValueError`` for a size that tokenizer and patches do not divide.
    """
    system.to(dtype)
    tokenizer, denoiser = system.tokenizer, system.denoiser
    if isinstance(denoiser, DiT):
        denoiser.activation_checkpointing = False
    if isinstance(denoiser, PretrainedDenoiser):
        denoiser.network.disable_gradient_checkpointing()
    grid = tokenizer.compression.grid(size)
    tokens = denoiser.patch.grid(grid.f, grid.h, grid.w).num_tokens
    zeros = partial(torch.zeros, dtype=dtype, device="meta")
    x_t = zeros(1, tokenizer.latent_channels, grid.f, grid.h, grid.w)
    condition = condition_of_zeros(system, 1)

    def forward() -> Tensor:
        return denoiser(x_t, zeros(1), condition)

    frames = zeros(1, 3, size.num_frames, size.height, size.width)
    with torch.no_grad():
        encode, _ = _measured(lambda: tokenizer.posterior(frames).mean)
        decode, _ = _measured(lambda: tokenizer.decode_raw(x_t))
        once, working_set = _measured(forward)
    with without_gradients(denoiser):
        step, activations = _measured(lambda: torch.autograd.backward(forward().sum()))
    return Count(
        tokens=tokens,
        parameters=_num_parameters(denoiser),
        trained=sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        tokenizer_parameters=_num_parameters(tokenizer),
        conditioner_parameters=_num_parameters(system.conditioner),
        encode_flops=encode,
        decode_flops=decode,
        forward_flops=once,
        backward_flops=step - once,
        working_set=working_set,
        activations=activations,
        checkpointed=checkpointed_activations(denoiser, tokens, activations, dtype.itemsize),
    )


def checkpointed_activations(
    denoiser: Denoiser, tokens: int, activations: float, itemsize: int
) -> float:
    """Return the activations of a DiT, or of a public one, that keeps the input of each block, and
    computes one block at a time again (arXiv 2205.05198, section 5); of other networks
    ``activations`` as they are.
    """
    if isinstance(denoiser, DiT):
        depth, width = len(denoiser.blocks), denoiser.x_in.out_features
    elif isinstance(denoiser, VideoTransformer):
        depth, width = denoiser.depth, denoiser.width
    else:
        return activations
    return depth * tokens * width * itemsize + activations / depth


def _measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the FLOPs of a call, and the peak of the memory that it allocates."""
    with FlopCounter() as counter, LiveMemory() as memory, _fused_attention():
        call()
    return float(counter.total), float(memory.peak)


@contextmanager
def _fused_attention() -> Iterator[None]:
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


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
