"""Spacetime Diffusion Transformer: DiT (arXiv 2212.09748) on video latents of any size, for any
layout.
"""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.blocks import DiTBlock, FinalLayer, TimeEmbedding
from sora_lightning.layers.partitions import AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.position import grid_coordinates, rotary_angles, sinusoidal_3d
from sora_lightning.types import Condition


class DiT(Denoiser):
    """Patches of latents to tokens, blocks of attention in the chosen layout, tokens back to
    patches.

    ``latent_channels`` and ``condition_width`` come from the tokenizer and the conditioner; a
    system passes them. Positions are absolute sinusoids at the input and rotary angles in every
    attention, both from the coordinates, so that no size is built in. ``patch`` counts latent
    frames, rows and columns.
    """

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
    ):
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(
                f"patch = {list(patch)} must be three positive numbers: frames, rows, columns"
            )
        super().__init__(Patch(*patch))
        layout = layout or Joint()
        self.width = width
        self.head_width = width // num_heads
        self.x_in = nn.Linear(latent_channels * self.patch.volume, width)
        self.time = TimeEmbedding(width)
        self.text_in = nn.Linear(condition_width, width)
        self.pooled_in = nn.Linear(condition_width, width)
        blocks = [DiTBlock(width, num_heads, mlp_ratio, layout.partitions(i)) for i in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final = FinalLayer(width, latent_channels * self.patch.volume)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in blocks:
            block.zero_init()
        self.final.zero_init()

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        condition: Condition,
    ) -> Float[Tensor, "b c f h w"]:
        grid = self.patch.grid(*x_t.shape[2:])
        coordinates = grid_coordinates(grid, x_t.device)
        angles = rotary_angles(coordinates, self.head_width)
        x = self.x_in(self.patch.patchify(x_t))  # b n d
        x = x + sinusoidal_3d(coordinates, self.width).to(x.dtype)
        text = Condition(
            self.text_in(condition.tokens), condition.mask, self.pooled_in(condition.pooled)
        )
        embedding = self.time(t[:, None]) + rearrange(text.pooled, "b d -> b 1 d")
        for block in self.blocks:
            x = block(x, embedding, text, angles, grid)
        return self.patch.unpatchify(self.final(x, embedding), grid)  # b c f h w
