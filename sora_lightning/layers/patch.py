"""Latents to spacetime tokens and back."""

from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sora_lightning.types import Compression, TokenGrid


@dataclass(frozen=True)
class Patch:
    """How many latent frames, rows and columns one token covers."""

    f: int = 1
    h: int = 1
    w: int = 1

    @property
    def volume(self) -> int:
        return self.f * self.h * self.w

    def grid(self, f: int, h: int, w: int) -> TokenGrid:
        """Token grid of latents of this extent. ``ValueError`` where the patch does not divide
        them.
        """
        for name, length, part in (("f", f, self.f), ("h", h, self.h), ("w", w, self.w)):
            if length % part:
                raise ValueError(
                    f"{length} latent positions along {name} are no multiple of {part}"
                )
        return TokenGrid(f // self.f, h // self.h, w // self.w)

    def compress(self, compression: Compression) -> Compression:
        """Pixels per token, given pixels per latent position."""
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
