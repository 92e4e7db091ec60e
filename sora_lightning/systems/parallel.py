"""Shares a model out over ranks: FSDP2 (``fully_shard``) over the ranks that read different clips,
tensor parallelism (DTensor) or context parallelism over those that share their clips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from einops import rearrange
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sora_lightning.checkpoint_shards import SUFFIX, SavedTensor, save_shards, with_shards
from sora_lightning.checks import require_at_least
from sora_lightning.conditioning.images import ImageEncoder
from sora_lightning.denoisers import Denoiser, DiT
from sora_lightning.denoisers.blocks import Block
from sora_lightning.layers.attention import CrossAttention, SelfAttention
from sora_lightning.layers.transformer import FeedForward


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, and parallelism of two kinds over groups of ranks that read the same clips.

    The ranks of a ``tensor_parallel_size`` divide the heads and hidden channels of every layer
    among them, those of a ``context_parallel_size`` the tokens of every clip, and the heads within
    attention. With both, a group has as many ranks as their product.

    Checkpoints are gathered on the first rank into one file, equal to that of one device. With
    ``save_shards`` each rank writes its part instead, into a folder beside the file, which all
    nodes must see (``sora_lightning.checkpoint_shards``): no rank holds a whole model, and the file
    and its folder move together. One device, DDP and any number of shards load either.
    """

    lightning_restore_optimizer = True

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        save_shards: bool = False,
    ):
        self.sizes = {
            "tensor_parallel_size": tensor_parallel_size,
            "context_parallel_size": context_parallel_size,
        }
        require_at_least(1, "", **self.sizes)
        ranks_per_clip = tensor_parallel_size * context_parallel_size
        super().__init__(tensor_parallel_size=ranks_per_clip, save_distributed_checkpoint=False)
        self.ranks_per_clip = ranks_per_clip
        self.save_shards = save_shards

    def setup_environment(self) -> None:
        num_ranks = self.num_nodes * self.num_processes
        if num_ranks % self.ranks_per_clip:
            sizes = ", ".join(f"{k} = {size}" for k, size in self.sizes.items() if size > 1)
            raise ValueError(
                f"trainer.strategy: {sizes}: the {num_ranks} ranks are not a multiple of "
                f"{self.ranks_per_clip}"
            )
        self._data_parallel_size = num_ranks // self.ranks_per_clip
        super().setup_environment()
        tensor, context = self.sizes.values()
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self._data_parallel_size, context, tensor),
            mesh_dim_names=("data_parallel", "context_parallel", "tensor_parallel"),
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        live = self.lightning_module.state_dict()
        saved = {
            name: shared_out(value, live[name]) if isinstance(live.get(name), Tensor) else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(saved, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Path | str, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if self.save_shards:
            folder = path.with_name(self.broadcast(f"{path.stem}-{token_hex(4)}{SUFFIX}"))
            content = save_shards(checkpoint, folder)
        else:
            content = self._gathered(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(content, path, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {
                    name: _like_parameter(value, parameters[index])
                    for name, value in of_parameter.items()
                }
                for index, of_parameter in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def load_checkpoint(
        self, checkpoint_path: Path | str, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = TorchCheckpointIO().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return with_shards(content, Path(checkpoint_path), read=False)

    def _gathered(self, state: Any) -> Any:
        """Return the state with whole tensors, on the CPU of the first rank."""

        def gather(tensor: Tensor) -> Tensor:
            gathered = whole(tensor)
            return gathered.cpu() if self.is_global_zero else gathered.new_empty(0)

        return apply_to_collection(state, Tensor, gather)


def _like_parameter(value: Any, parameter: Tensor) -> Any:
    """Return an optimizer's state, in the parameter's shares where it has its shape."""
    if isinstance(value, Tensor | SavedTensor) and tuple(value.shape) == tuple(parameter.shape):
        return shared_out(value, parameter)
    return value.read() if isinstance(value, SavedTensor) else value


def is_sharded(module: nn.Module) -> bool:
    """Return True if ranks hold shares of a module's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def share_out(denoiser: Denoiser, trained: Iterable[nn.Module | None], mesh: DeviceMesh) -> None:
    """Share the denoiser's layers and tokens, and the parameters of ``trained``, out over the mesh
    of a ``ShardedStrategy``.
    """
    split_heads(denoiser, mesh["tensor_parallel"])
    split_tokens(denoiser, mesh["context_parallel"])
    if mesh["context_parallel"].size() == 1:
        shard_parameters(trained, mesh["data_parallel"])
    else:  # gradients are of a part of the tokens: their mean is taken over these ranks, too
        shard_parameters(trained, mesh["data_parallel", "context_parallel"]._flatten("sharded"))


def split_tokens(denoiser: Denoiser, mesh: DeviceMesh) -> None:
    """Have the ranks of ``mesh`` divide the tokens of each clip among them.

    Raises ``ValueError`` for another network than a ``DiT``, and heads that cannot be shared out.
    """
    if mesh.size() == 1:
        return
    refusal = f"trainer.strategy: context_parallel_size = {mesh.size()}"
    if not isinstance(denoiser, DiT):
        raise ValueError(
            f"{refusal}: a {type(denoiser).__name__} does not divide its tokens over ranks, as a "
            "DiT does; give 1"
        )
    for block in denoiser.blocks:
        assert isinstance(block, Block)
        for attention in [*block.attentions, *([] if block.text is None else [block.text])]:
            if type(attention) not in (SelfAttention, CrossAttention):
                raise ValueError(
                    f"{refusal}: the heads of a {type(attention).__name__} differ; give 1"
                )
            assert isinstance(attention, SelfAttention | CrossAttention)
            shares = 1
            if isinstance(attention, SelfAttention):
                shares = len(attention.partition.head_partitions)
            if attention.num_heads % (shares * mesh.size()):
                many = "" if shares == 1 else f", since {shares} partitions share the heads"
                raise ValueError(
                    f"{refusal}: num_heads = {attention.num_heads} must be a multiple of "
                    f"{shares * mesh.size()}{many}"
                )
    denoiser.context_group = mesh.get_group()


def split_heads(denoiser: Denoiser, mesh: DeviceMesh) -> None:
    """Give each rank of ``mesh`` its share of the heads and hidden channels of every block
    (Megatron-LM, arXiv 1909.08053, section 3).

    Raises ``ValueError`` for a denoiser without such blocks, and heads that cannot be shared out.
    """
    if mesh.size() == 1:
        return
    blocks = [module for module in denoiser.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size = {mesh.size()}: a {type(denoiser).__name__} "
            "has no blocks to share out; give 1, and data_parallel_size the number of ranks"
        )
    for block in blocks:
        for attention in block.attentions:
            _split_attention(attention, ("qkv", 3), mesh)
        if block.text is not None:
            _split_attention(block.text, ("kv", 2), mesh)
        if isinstance(block.mlp, FeedForward):
            parallelize_module(block.mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _split_attention(attention: nn.Module, fused: tuple[str, int], mesh: DeviceMesh) -> None:
    refusal = f"trainer.strategy: tensor_parallel_size = {mesh.size()}"
    name, num_parts = fused
    alike = isinstance(attention, SelfAttention) and len(attention.partition.head_partitions) == 1
    if type(attention) is not CrossAttention and not (type(attention) is SelfAttention and alike):
        raise ValueError(f"{refusal}: the heads of a {type(attention).__name__} differ; give 1")
    assert isinstance(attention, SelfAttention | CrossAttention)
    if attention.num_heads % mesh.size():
        raise ValueError(f"{refusal}: num_heads = {attention.num_heads} is not a multiple of it")
    # A fused projection's rows are q, k and v one after the other, so a rank's rows are not its
    # heads: the output is gathered, and each rank goes on with its heads.
    gathered = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    plan: dict[str, ParallelStyle] = {name: gathered, "out": RowwiseParallel()}
    if hasattr(attention, "q"):
        plan["q"] = ColwiseParallel()
    for norm in ("q_norm", "k_norm"):
        if any(True for _ in getattr(attention, norm).parameters()):
            plan[norm] = SequenceParallel(sequence_dim=1, use_local_output=True)  # b k n e
    parallelize_module(attention, mesh, plan)
    attention.num_heads //= mesh.size()

    def own_heads(_module: nn.Module, _inputs: object, output: DTensor) -> Tensor:
        whole = output.to_local(grad_placements=[Partial()])
        shares = rearrange(whole, "b n (p r d) -> r b n (p d)", p=num_parts, r=mesh.size())
        return shares[mesh.get_local_rank()]

    getattr(attention, name).register_forward_hook(own_heads)


def shard_parameters(modules: Iterable[nn.Module | None], mesh: DeviceMesh) -> None:
    """Shard the parameters of each module that trains over ``mesh``; they are gathered block by
    block when they are used.
    """
    if mesh.size() == 1:
        return
    for module in modules:
        if module is None or not any(p.requires_grad for p in module.parameters()):
            continue
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        # Sharded again after a validation too, where no backward pass follows.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        if isinstance(module, ImageEncoder):
            register_fsdp_forward_method(module, "known")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what the outermost lists of modules hold, as a network's blocks."""
    for part in module.children():
        yield from part if isinstance(part, nn.ModuleList) else _blocks(part)


def by_mesh(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Return the parameters in groups that are sharded over the same ranks, as one operation on
    several of them needs.
    """
    groups: dict[DeviceMesh | None, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[mesh].append(parameter)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> None:
    """Scale all gradients so that their common norm is at most ``max_norm``."""
    groups = by_mesh(p for p in parameters if p.grad is not None)
    if not groups:  # the step is skipped
        return
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    total = torch.stack([whole(norm) for norm in norms]).norm()
    for group in groups:
        clip_grads_with_norm_(group, max_norm, total)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shares of all ranks, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Return this rank's share of a tensor, without asking the others."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor | SavedTensor, like: Tensor) -> Tensor:
    """Return a whole tensor as the parameter ``like`` is: its device, type and shares of ranks."""
    tensor = tensor.read() if isinstance(tensor, SavedTensor) else tensor
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
