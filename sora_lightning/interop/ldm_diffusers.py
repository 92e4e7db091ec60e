"""Latent diffusion's autoencoder: weights of diffusers' ``AutoencoderKL``, under its current names
or those before its attention had processors.
"""

from __future__ import annotations

import re

from torch import Tensor

from sora_lightning.interop import ldm
from sora_lightning.interop.pretrained import Pretrained
from sora_lightning.interop.renaming import Weights

_NAMES = ldm.Names(
    down="encoder.down_blocks.{}.resnets.{}",
    downsample="encoder.down_blocks.{}.downsamplers.0.conv",
    up="decoder.up_blocks.{}.resnets.{}",
    upsample="decoder.up_blocks.{}.upsamplers.0.conv",
    up_from_coarse=True,
    middle=(
        "{side}.mid_block.resnets.0",
        "{side}.mid_block.attentions.0",
        "{side}.mid_block.resnets.1",
    ),
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    attention_is_convolution=False,
    shortcut="conv_shortcut",
    norm_out="{side}.conv_norm_out",
)
_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return an ``LDMTokenizer`` that normalises by Stable Diffusion's scaling factor.

    Raises ``ValueError`` for other weights.
    """
    renamed = {_new_name(name): tensor for name, tensor in weights.items()}
    return ldm.read(renamed, _NAMES, "diffusers' AutoencoderKL")


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the current names of ``AutoencoderKL``."""
    return ldm.write(pretrained, _NAMES)


def _new_name(name: str) -> str:
    def new(match: re.Match[str]) -> str:
        return f"attentions.0.{_BEFORE[match[1]]}."

    return re.sub(rf"attentions\.0\.({'|'.join(_BEFORE)})\.", new, name)
