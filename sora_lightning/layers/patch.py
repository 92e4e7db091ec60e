"""Patches: latents to spacetime tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_three
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.types import Compression, PackedLatents, TokenGrid


@dataclass(frozen=True)
class Patch:
    """Number of latent frames, rows and columns of one token."""

    f: int = 1
    h: int = 1
    w: int = 1

    @classmethod
    def of(cls, patch: Sequence[int], name: str = "patch") -> Patch:
        """Return the patch of three numbers. Raises ``ValueError`` naming it for anything else."""
        require_three(1, **{name: patch})
        return cls(*patch)

    @property
    def volume(self) -> int:
        return self.f * self.h * self.w

    def grid(self, f: int, h: int, w: int) -> TokenGrid:
        """Return the token grid of latents of this extent.

        Raises ``ValueError`` if the patch does not divide them.
        """
        for name, length, part in (("f", f, self.f), ("h", h, self.h), ("w", w, self.w)):
            if length % part:
                raise ValueError(
                    f"{length} latent positions along {name} are no multiple of {part}"
                )
        return TokenGrid(f // self.f, h // self.h, w // self.w)

    def compress(self, compression: Compression) -> Compression:
        """Return the pixels of a token, given the pixels of a latent position."""
        return Compression(
            compression.frames * self.f, compression.height * self.h, compression.width * self.w
        )

    def patchify(self, latents: Float[Tensor, "b c F H W"]) -> Float[Tensor, "b n d"]:
        return rearrange(
            latents,
            "b c (f p) (h q) (w r) -> b (f h w) (p q r c)",
            p=self.f,
            q=self.h,
            r=self.w,
        )

    def unpatchify(
        self, tokens: Float[Tensor, "b n d"], grid: TokenGrid
    ) -> Float[Tensor, "b c F H W"]:
        return rearrange(
            tokens,
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            f=grid.f,
            h=grid.h,
            w=grid.w,
            p=self.f,
            q=self.h,
            r=self.w,
        )

    def sequence(self, x: Float[Tensor, "b c F H W"] | PackedLatents) -> PackedSequence:
        """Return the sequence of the tokens of a batch or pack.

        A token of a pack is kept if all of its latents are ``shown``.
        """
        if not isinstance(x, PackedLatents):
            return PackedSequence([self.grid(*x.shape[2:])], x.device)
        kept = None
        if x.shown is not None:
            masks = [self.patchify(mask[None, None].float()) for mask in x.shown]  # 1 n d
            kept = [torch.nonzero(mask[0].amin(-1) > 0)[:, 0] for mask in masks]
        grids = [self.grid(*clip.shape[1:]) for clip in x.clips]
        return PackedSequence(grids, x.clips[0].device, kept=kept)

    def to_tokens(
        self, x: Float[Tensor, "b c F H W"] | PackedLatents, sequence: PackedSequence
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens of a batch or pack in their sequence."""
        if not isinstance(x, PackedLatents):
            return self.patchify(x)
        clips = [self.patchify(clip[None]) for clip in x.clips]
        return torch.cat(sequence.select(clips), dim=1)

    def from_tokens(
        self,
        tokens: Float[Tensor, "b n d"],
        sequence: PackedSequence,
        like: Float[Tensor, "b c F H W"] | PackedLatents,
    ) -> Float[Tensor, "b out F H W"] | PackedLatents:
        """Return the latents of tokens in a sequence, as a batch or pack as ``like`` is.

        Latents of dropped tokens are 0.
        """
        if not isinstance(like, PackedLatents):
            return self.unpatchify(tokens, sequence.grids[0])
        clips = sequence.scatter(tokens.split(sequence.num_tokens, dim=1))
        outputs = map(self.unpatchify, clips, sequence.grids)
        return replace(like, clips=tuple(output[0] for output in outputs))
