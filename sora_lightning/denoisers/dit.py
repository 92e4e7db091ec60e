"""Spacetime Diffusion Transformer: DiT (arXiv 2212.09748) on video latents of any size, in any
attention layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.blocks import (
    AdaLNBlock,
    Block,
    BlockFactory,
    BlockShape,
    TimeEmbedding,
)
from sora_lightning.denoisers.conditioning_embedding import (
    BlockContext,
    ConditioningEmbedding,
    Timesteps,
)
from sora_lightning.denoisers.conditions import ConditionInput, TextAndPooled
from sora_lightning.denoisers.modulation import zero_init
from sora_lightning.denoisers.sizes import named_size
from sora_lightning.layers.context_parallel import TokenShards
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import (
    PositionEmbedding,
    PositionEmbeddings,
    Sinusoidal,
)
from sora_lightning.layers.positions.rotary import Rotary
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import Condition, PackedLatents


@dataclass(frozen=True)
class DiTParts:
    """The exchangeable parts of a DiT, each a class that a YAML chooses by its ``class_path``.

    ``block`` is the network's own where null: adaLN-Zero in a ``DiT``. ``positions`` are added to
    the tokens; ``rotary`` rotates queries and keys, and null is none.
    """

    block: BlockFactory | None = None
    condition: Callable[[int, int], ConditionInput] = TextAndPooled
    positions: Sequence[Callable[[int], PositionEmbedding]] = (Sinusoidal,)
    rotary: Rotary | None = field(default_factory=Rotary)
    time: Callable[[int], TimeEmbedding] = TimeEmbedding


class DiT(Denoiser):
    """Cut latents into patches, run transformer blocks over their tokens, and unpatch the result.

    ``latent_channels`` and ``condition_width`` come from the tokenizer and the conditioner; a
    system passes them. ``size`` is a row of ``SIZES`` by name, or numbers of its own. ``patch``
    counts latent frames, rows and columns. ``learned_sigma`` doubles the channels of the prediction
    (DiT's variance). ``self_conditioning`` concatenates an earlier estimate of the latents to the
    input (W.A.L.T); ``concat_channels`` concatenates ``Condition.concat_latents``, one channel more
    than the latents have. ``activation_checkpointing`` keeps the input of each block and recomputes
    the rest in the backward pass.

    The ranks of ``context_group``, which see the same latents, divide the tokens among them from
    the first block to the last; ``None`` is one process.
    """

    drops_tokens = True
    block: ClassVar[BlockFactory] = AdaLNBlock

    def __init__(
        self,
        latent_channels: int,
        condition_width: int,
        size: TransformerSize | str = "S",
        patch: Sequence[int] = (1, 2, 2),
        layout: AttentionLayout | None = None,
        parts: DiTParts | None = None,
        learned_sigma: bool = False,
        self_conditioning: bool = False,
        concat_channels: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__(Patch.of(patch))
        size, parts = named_size(size), parts or DiTParts()
        self.self_conditioning = self_conditioning
        self.num_concat_channels = latent_channels + 1 if concat_channels else 0
        self.activation_checkpointing = activation_checkpointing
        self.context_group: ProcessGroup | None = None
        in_channels = latent_channels * (2 if self_conditioning else 1) + self.num_concat_channels
        out_channels = latent_channels * (2 if learned_sigma else 1)
        self.x_in = nn.Linear(in_channels * self.patch.volume, size.width)
        self.time = parts.time(size.width)
        self.condition = parts.condition(condition_width, size.width)
        self.positions = PositionEmbeddings(
            (position(size.width) for position in parts.positions), size.depth - 1
        )
        self.rotary, self.head_width = parts.rotary, size.head_width
        shapes = [
            BlockShape.of(size, partitions, self.attends_to_text(i))
            for i, partitions in enumerate((layout or Joint()).schedule(size.depth))
        ]
        blocks = self.make_blocks(parts.block or type(self).block, shapes)
        self.blocks = nn.ModuleList(blocks)
        shared_width = blocks[0].shared_width
        self.shared = nn.Linear(size.width, shared_width) if shared_width else None
        self.final = blocks[0].final_layer(out_channels * self.patch.volume)
        self._initialise(blocks)

    @property
    def condition_input(self) -> ConditionInput:
        return self.condition

    def _initialise(self, blocks: Sequence[Block]) -> None:
        """Initialise like DiT: Xavier in the blocks, zero for their outputs and the final layer."""
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

    def make_blocks(self, make: BlockFactory, shapes: Sequence[BlockShape]) -> list[Block]:
        """Return the blocks of these shapes."""
        return [make(shape) for shape in shapes]

    def attends_to_text(self, block: int) -> bool:
        """Return True if the block of this index attends to text."""
        every = self.condition.text_every
        return bool(every) and block % every == 0

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
        estimate: Float[Tensor, "b c f h w"] | PackedLatents | None = None,
    ) -> Float[Tensor, "b out f h w"] | PackedLatents:
        """See ``Denoiser.forward``. ``estimate`` is of the clean latents, for self-conditioning;
        ``None`` is zeros.
        """
        x, context = self.embed(x_t, t, condition, estimate)  # b n d
        x = self.run_blocks(x, context)  # b n d
        return self.to_latents(x, context, x_t)  # as x_t

    def embed(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
        estimate: Float[Tensor, "b c f h w"] | PackedLatents | None = None,
    ) -> tuple[Float[Tensor, "b m d"], BlockContext]:
        """Return the tokens before the first block, and what the blocks take beside them."""
        sequence = self.patch.sequence(x_t)
        inputs = self._concat(x_t, condition.concat_latents, estimate)
        x = self.patch.to_tokens(inputs, sequence)  # b n p
        x = self.x_in(x.to(self.x_in.weight.dtype))  # b n d
        x = self.positions.add(x, 0, sequence)
        if isinstance(x_t, PackedLatents):
            t = sequence.times(t)
        c = self._conditioning(Timesteps.of(t, sequence), self.condition.pooled(condition))
        text = self.condition.text(condition)  # clips l d
        context = BlockContext(sequence, c, self.angles(sequence), text, condition.mask)
        x, context = self.with_condition_tokens(x, context)
        if self.context_group is None:
            return x, context
        shards = TokenShards(self.context_group, x.shape[1])
        return x[:, shards.own].clone(), context.divided(shards)  # b own d

    def with_condition_tokens(
        self, x: Float[Tensor, "b n d"], context: BlockContext
    ) -> tuple[Float[Tensor, "b m d"], BlockContext]:
        """Return tokens and context with the condition's tokens among them; here there are none."""
        return x, context

    def run_blocks(
        self, x: Float[Tensor, "b n d"], context: BlockContext, which: slice = slice(None)
    ) -> Float[Tensor, "b n d"]:
        """Run some of the blocks, each after the positions that are added before it."""
        for i in range(len(self.blocks))[which]:
            if i > 0:
                x = self.positions.add(x, i, context.sequence)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Looked up in its module at each call, where ``cuda_autocast`` replaces it.
                x = torch.utils.checkpoint.checkpoint(
                    self.blocks[i], x, context, use_reentrant=False
                )
            else:
                x = self.blocks[i](x, context)
        return x

    def to_latents(
        self,
        x: Float[Tensor, "b n d"],
        context: BlockContext,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
    ) -> Float[Tensor, "b out f h w"] | PackedLatents:
        """Return the prediction from the tokens after the last block, as a batch or pack as
        ``x_t`` is.
        """
        sequence = context.sequence
        x = self.final(x, context.c)  # b m p
        x = sequence.remove_context(sequence.all_tokens(x))  # b n p
        return self.patch.from_tokens(x, sequence, x_t)

    def angles(self, sequence: PackedSequence) -> Float[Tensor, "n a"] | None:
        """Return the rotary angles of the tokens."""
        return None if self.rotary is None else self.rotary.angles(sequence, self.head_width)

    def _conditioning(
        self, times: Timesteps, pooled: Float[Tensor, "clips d"] | None
    ) -> ConditioningEmbedding:
        if pooled is not None and times.clip is not None:
            pooled = pooled[times.clip]
        time = self.time(times.t)  # r d
        c = time if pooled is None else time + pooled  # r d
        activated = F.silu(c)
        shared = None if self.shared is None else self.shared(activated)
        return ConditioningEmbedding(time, pooled, c, times.row_of_token, activated, shared)

    def _concat(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        concat_latents: Float[Tensor, "b e f h w"] | None,
        estimate: Float[Tensor, "b c f h w"] | PackedLatents | None,
    ) -> Float[Tensor, "b in f h w"] | PackedLatents:
        """Concatenate what the network takes beside the noisy latents to their channels."""
        if isinstance(x_t, PackedLatents):
            if concat_latents is not None:
                raise ValueError(
                    "channels beside the latents cannot be packed: clips differ in size"
                )
            assert not isinstance(estimate, Tensor)
            estimates = [None] * len(x_t) if estimate is None else [e[None] for e in estimate.clips]
            clips = zip(x_t.clips, estimates, strict=True)
            return replace(
                x_t, clips=tuple(self._concat_dense(x[None], None, e)[0] for x, e in clips)
            )
        assert not isinstance(estimate, PackedLatents)
        return self._concat_dense(x_t, concat_latents, estimate)

    def _concat_dense(
        self, x_t: Tensor, concat_latents: Tensor | None, estimate: Tensor | None
    ) -> Float[Tensor, "b in f h w"]:
        if estimate is not None and not self.self_conditioning:
            raise ValueError("an estimate is for a network with self_conditioning")
        if concat_latents is not None and not self.num_concat_channels:
            raise ValueError("channels beside the latents are for a network with concat_channels")
        parts = [x_t]
        if self.self_conditioning:
            parts.append(torch.zeros_like(x_t) if estimate is None else estimate)
        if self.num_concat_channels:
            zeros = x_t.new_zeros(len(x_t), self.num_concat_channels, *x_t.shape[2:])
            parts.append(zeros if concat_latents is None else concat_latents)
        return torch.cat(parts, dim=1)
