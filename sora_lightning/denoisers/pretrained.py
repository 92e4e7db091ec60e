"""Public video networks of diffusers as denoisers, from their folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.lora import add_lora, described
from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser
from sora_lightning.denoisers.pretrained_transformers import (
    CogVideoXDenoiser,
    HunyuanVideoDenoiser,
    LatteDenoiser,
    LTXDenoiser,
    WanDenoiser,
)
from sora_lightning.denoisers.pretrained_unets import I2VGenXLDenoiser, UNet3DDenoiser
from sora_lightning.diffusers_folders import (
    Config,
    cast_as_read,
    part_of_pipeline,
    read_config,
    read_network,
)

if TYPE_CHECKING:
    from peft import LoraConfig

_KINDS: dict[str, type[PretrainedDenoiser]] = {
    kind.network_class: kind
    for kind in (
        WanDenoiser,
        LTXDenoiser,
        CogVideoXDenoiser,
        HunyuanVideoDenoiser,
        LatteDenoiser,
        UNet3DDenoiser,
        I2VGenXLDenoiser,
    )
}


def pretrained_denoiser(
    folder: Path,
    lora: LoraConfig | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    activation_checkpointing: bool = False,
    fps: float = 25.0,
) -> PretrainedDenoiser:
    """Return the video transformer or U-Net of a folder that diffusers' ``save_pretrained`` wrote,
    or of a whole pipeline's folder.

    Without ``lora`` all weights train,
    and a checkpoint holds them and the configuration: it needs no folder. On the meta device no
    weights are read.

    Args:
        folder: Holds ``config.json`` and the weights, or, of a pipeline, ``model_index.json``. It
            may be a name on the hub, as ``owner/name``.
        lora: Adapters (arXiv 2106.09685) of the layers that it names. They alone train and stand
            in a checkpoint, which then needs the folder; another folder's weights are refused.
        dtype: Type of the weights that do not train. Adapters are float32. Without ``lora`` it must
            be float32.
        activation_checkpointing: Recompute each block in the backward pass; U-Nets cannot.
        fps: Frames per second of the clips, which LTX's positions and I2VGen-XL take and others do
            not.

    Raises ``ValueError`` for a folder without such a network or its weights, and for adapters that
    match no layer.
    """
    path = part_of_pipeline(Path(folder), "transformer", "unet")
    config = read_config(path, _KINDS, "a denoiser", "a video network", "transformer or unet")
    if lora is None and dtype != "float32":
        raise ValueError(f"dtype = {dtype!r}: all weights train, in float32; it is for lora alone")
    on_meta, weights = torch.empty(0).is_meta, getattr(torch, dtype)
    with torch.device("meta"):  # no weights are drawn before others are read
        denoiser = configured_denoiser(config, activation_checkpointing, fps)
    if on_meta:
        cast_as_read(denoiser.network, weights)
    else:
        denoiser.network = read_network(path, denoiser.network_class, weights)
        denoiser.set_activation_checkpointing()
    if lora is not None:
        add_lora(denoiser, lora)
        arguments = {"folder": str(folder), "lora": described(lora), "dtype": dtype}
        denoiser.specification = _specification(pretrained_denoiser, denoiser, **arguments)
    return denoiser.train()


def configured_denoiser(
    config: Config, activation_checkpointing: bool = False, fps: float = 25.0
) -> PretrainedDenoiser:
    """Return a video network of this configuration with random weights.

    By this, a checkpoint that holds all weights builds it again. See ``pretrained_denoiser``.
    """
    denoiser = _KINDS[config["_class_name"]](config, activation_checkpointing, fps)
    denoiser.specification = _specification(configured_denoiser, denoiser, config=config)
    return denoiser


def _specification(
    function: Callable[..., Denoiser], denoiser: PretrainedDenoiser, **arguments: Any
) -> dict[str, Any]:
    checkpointing = denoiser.activation_checkpointing
    arguments |= {"activation_checkpointing": checkpointing, "fps": denoiser.fps}
    path = f"{function.__module__}.{function.__qualname__}"
    return {"class_path": path, "init_args": arguments}
