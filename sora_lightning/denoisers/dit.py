"""Spacetime Diffusion Transformer: DiT (arXiv 2212.09748) on video latents of any size, for any
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.blocks import (
    AdaLNBlock,
    Block,
    BlockShape,
    InContextBlock,
    TimeEmbedding,
)
from sora_lightning.denoisers.conditioning_embedding import (
    BlockContext,
    ConditioningEmbedding,
    Timesteps,
)
from sora_lightning.denoisers.conditions import ConditionInput, TextAndPooled
from sora_lightning.denoisers.modulation import zero_init
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import PositionEmbedding, Sinusoidal
from sora_lightning.layers.positions.rotary import Rotary
from sora_lightning.types import Condition, PackedLatents


@dataclass(frozen=True)
class DiTParts:
    """What a DiT is made of, each part a class that a YAML may exchange by its ``class_path``.

    ``positions`` are added to the tokens, ``rotary`` turns queries and keys; null is none.
    """

    block: Callable[[BlockShape], Block] = AdaLNBlock
    condition: Callable[[int, int], ConditionInput] = TextAndPooled
    positions: Sequence[Callable[[int], PositionEmbedding]] = (Sinusoidal,)
    rotary: Rotary | None = field(default_factory=Rotary)


@runtime_checkable
class Middle(Protocol):
    """Stands in for some blocks in a row: ``run`` takes the tokens before them, and a function that
    computes them.
    """

    @property
    def blocks(self) -> slice: ...

    def run(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor: ...


class DiT(Denoiser):
    """Patches of latents to tokens, blocks of attention in the chosen layout, tokens back to
    patches.

    ``latent_channels`` and ``condition_width`` come from the tokenizer and the conditioner; a
    system passes them. Positions are computed from coordinates, and those of the default parts have
    no size built in. ``patch`` counts latent frames, rows and columns. ``learned_sigma`` doubles
    the channels of the prediction (DiT's variance). ``self_conditioning`` takes an earlier estimate
    of the latents as more channels (W.A.L.T); ``concat_channels`` takes ``concat_latents`` so, one
    more channel than the latents have. ``activation_checkpointing`` keeps only each block's input
    for the backward pass and computes the rest again. ``time_scale`` is the number of steps that
    the time embedding counts from data to noise: SiT's is 1.
    """

    drops_tokens = True

    def __init__(
        self,
        latent_channels: int,
        condition_width: int,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patch: Sequence[int] = (1, 2, 2),
        layout: AttentionLayout | None = None,
        parts: DiTParts | None = None,
        learned_sigma: bool = False,
        self_conditioning: bool = False,
        activation_checkpointing: bool = False,
        time_scale: float = 1000.0,
        concat_channels: bool = False,
    ):
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(
                f"patch = {list(patch)} must be three positive numbers: frames, rows, columns"
            )
        super().__init__(Patch(*patch))
        parts = parts or DiTParts()
        schedule = (layout or Joint()).schedule(depth)
        self.head_width = width // num_heads
        self.self_conditioning = self_conditioning
        self.activation_checkpointing = activation_checkpointing
        self.num_concat_channels = latent_channels + 1 if concat_channels else 0
        in_channels = latent_channels * (2 if self_conditioning else 1) + self.num_concat_channels
        self.x_in = nn.Linear(in_channels * self.patch.volume, width)
        self.time = TimeEmbedding(width, scale=time_scale)
        self.condition = parts.condition(condition_width, width)
        self.positions = nn.ModuleList(position(width) for position in parts.positions)
        self.rotary = parts.rotary
        every = self.condition.text_every
        blocks = [
            parts.block(
                BlockShape(width, num_heads, mlp_ratio, partitions, bool(every) and i % every == 0)
            )
            for i, partitions in enumerate(schedule)
        ]
        self.blocks = nn.ModuleList(blocks)
        self._check_positions()
        shared_width = blocks[0].shared_width
        self.shared = nn.Linear(width, shared_width) if shared_width else None
        out_channels = latent_channels * (2 if learned_sigma else 1)
        self.final = blocks[0].final_layer(out_channels * self.patch.volume)
        self._initialise(blocks)

    def _check_positions(self) -> None:
        last = 0 if isinstance(self.blocks[0], InContextBlock) else len(self.blocks) - 1
        for position in self.positions:
            assert isinstance(position, PositionEmbedding)
            if position.before_block > last:
                raise ValueError(
                    f"before_block = {position.before_block} of {type(position).__name__}: must be "
                    f"at most {last} in this network"
                )

    def _initialise(self, blocks: list[Block]) -> None:
        """As DiT: Xavier in the blocks, zero where a new block or a new network gives nothing."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in blocks:
            block.zero_init()
        if self.shared is not None:
            zero_init(self.shared)
        self.final.zero_init()

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
        estimate: Float[Tensor, "b c f h w"] | PackedLatents | None = None,
        middle: Middle | None = None,
    ) -> Float[Tensor, "b out f h w"] | PackedLatents:
        """See ``Denoiser.forward``. ``estimate`` is of the clean latents, for self-conditioning;
        ``None`` is zeros. ``middle`` runs some of the blocks, or does without.
        """
        if isinstance(x_t, PackedLatents):
            assert not isinstance(estimate, Tensor)
            return self._forward_packed(x_t, t, condition, estimate)
        assert not isinstance(estimate, PackedLatents)
        sequence = self._arrange([x_t.shape[2:]], x_t.device)
        x_t = self._with_concat(self._with_estimate(x_t, estimate), condition.concat_latents)
        x = self.patch.patchify(x_t)
        y = self._predict(x, t, condition, sequence, middle)
        return self.patch.unpatchify(y, sequence.grids[0])

    def _forward_packed(
        self,
        x_t: PackedLatents,
        t: Float[Tensor, " times"],
        condition: Condition,
        estimate: PackedLatents | None = None,
    ) -> PackedLatents:
        clips, estimates = x_t.clips, [None] * len(x_t) if estimate is None else estimate.clips
        if condition.concat_latents is not None:
            raise ValueError("channels beside the latents cannot be packed: clips differ in size")
        kept = self._kept(x_t)
        sequence = self._arrange([clip.shape[1:] for clip in clips], clips[0].device, kept)
        inputs = [
            self._with_estimate(clip[None], None if e is None else e[None])
            for clip, e in zip(clips, estimates, strict=True)
        ]
        patches = [self.patch.patchify(self._with_concat(x, None)) for x in inputs]
        if kept is not None:
            patches = [patch[:, tokens] for patch, tokens in zip(patches, kept, strict=True)]
            if len(t) != len(clips):
                of_clips = zip(t.split(self.num_tokens(x_t)), kept, strict=True)
                t = torch.cat([times[tokens] for times, tokens in of_clips])
        if not sequence.is_packed:
            t = t[None] if len(t) > 1 else t
        y = self._predict(torch.cat(patches, dim=1), t, condition, sequence)
        parts = y.split(sequence.num_tokens, dim=1)
        if kept is not None:
            parts = tuple(
                part.new_zeros(1, grid.num_tokens, part.shape[2]).index_copy(1, tokens, part)
                for part, tokens, grid in zip(parts, kept, sequence.grids, strict=True)
            )
        outputs = map(self.patch.unpatchify, parts, sequence.grids)
        return replace(x_t, clips=tuple(output[0] for output in outputs))

    def _kept(self, x_t: PackedLatents) -> list[Int[Tensor, " _n"]] | None:
        """The numbers of the tokens that are shown whole, of each clip."""
        if x_t.shown is None:
            return None
        masks = [self.patch.patchify(mask[None, None].float()) for mask in x_t.shown]
        return [torch.nonzero(mask[0].amin(-1) > 0)[:, 0] for mask in masks]

    def _arrange(
        self,
        extents: Sequence[Sequence[int]],
        device: torch.device,
        kept: Sequence[Int[Tensor, " _n"]] | None = None,
    ) -> PackedSequence:
        return PackedSequence([self.patch.grid(*extent) for extent in extents], device, kept=kept)

    def _with_estimate(self, x_t: Tensor, estimate: Tensor | None) -> Tensor:
        if self.self_conditioning:
            return torch.cat([x_t, torch.zeros_like(x_t) if estimate is None else estimate], dim=1)
        if estimate is not None:
            raise ValueError("an estimate is for a network with self_conditioning")
        return x_t

    def _with_concat(self, x_t: Tensor, given: Tensor | None) -> Tensor:
        if self.num_concat_channels:
            b, _, f, h, w = x_t.shape
            zeros = x_t.new_zeros(b, self.num_concat_channels, f, h, w)
            return torch.cat([x_t, zeros if given is None else given], dim=1)
        if given is not None:
            raise ValueError("channels beside the latents are for a network with concat_channels")
        return x_t

    def _predict(
        self,
        x: Float[Tensor, "b n p"],
        t: Float[Tensor, "*times"],
        condition: Condition,
        sequence: PackedSequence,
        middle: Middle | None = None,
    ) -> Float[Tensor, "b n out"]:
        """Patches in, patches out."""
        c = self._conditioning(Timesteps.of(t, sequence), self.condition.pooled(condition))
        text = self.condition.text(condition)
        x = self._add_positions(self.x_in(x), 0, sequence)  # b n d
        first = self.blocks[0]
        assert isinstance(first, Block)
        x, context = first.join(x, BlockContext(sequence, c, text=text, mask=condition.mask))
        if self.rotary is not None:
            angles = self.rotary.angles(context.sequence, self.head_width)
            context = replace(context, angles=angles)
        if middle is None:
            x = self._run(x, context, slice(None))
        else:
            between = middle.blocks
            x = self._run(x, context, slice(between.start))
            x = middle.run(x, lambda x: self._run(x, context, between))
            x = self._run(x, context, slice(between.stop, None))
        return self.final(context.sequence.remove_context(x), c)

    def _run(self, x: Float[Tensor, "b n d"], context: BlockContext, which: slice) -> Tensor:
        """Some of the blocks, each with the positions that stand before it."""
        for i in range(len(self.blocks))[which]:
            if i > 0:
                x = self._add_positions(x, i, context.sequence)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[i], x, context, use_reentrant=False)
            else:
                x = self.blocks[i](x, context)
        return x

    def _add_positions(self, x: Tensor, block: int, sequence: PackedSequence) -> Tensor:
        for position in self.positions:
            if position.before_block == block:
                x = x + position(sequence).to(x.dtype)
        return x

    def _conditioning(
        self, times: Timesteps, pooled: Float[Tensor, "clips d"] | None
    ) -> ConditioningEmbedding:
        if pooled is not None and times.clip is not None:
            pooled = pooled[times.clip]
        time = self.time(times.t)  # r d
        embedding = time if pooled is None else time + pooled
        activated = F.silu(embedding)
        shared = None if self.shared is None else self.shared(activated)
        return ConditioningEmbedding(time, pooled, embedding, times.row_of_token, activated, shared)
