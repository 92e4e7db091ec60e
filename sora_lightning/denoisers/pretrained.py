"""Public video transformers of diffusers as denoisers: Wan, LTX-Video and CogVideoX.

Each class says how time, text and patches of ours map to the network's. What the network predicts
is in its scheduler's configuration: ``sora_lightning.diffusion.pretrained_objective``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.denoisers.base import Denoiser, clip_by_clip
from sora_lightning.denoisers.lora import add_lora, described
from sora_lightning.diffusers_folders import (
    Config,
    diffusers_class,
    read_config,
    read_network,
)
from sora_lightning.files import part_of_pipeline
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition, PackedLatents

if TYPE_CHECKING:
    from peft import LoraConfig

# The pipelines multiply the flow's time by the schedulers' num_train_timesteps.
_NUM_STEPS = 1000


def pretrained_denoiser(
    folder: Path,
    lora: LoraConfig | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    activation_checkpointing: bool = False,
    fps: float = 25.0,
) -> PretrainedDenoiser:
    """Return the video transformer of a folder that diffusers' ``save_pretrained`` wrote, or of a
    whole pipeline's folder.

    Without ``lora`` all weights train,
    and a checkpoint holds them and the configuration: it needs no folder. On the meta device no
    weights are read.

    Args:
        folder: Holds ``config.json`` and the weights, or, of a pipeline, ``model_index.json``.
        lora: Adapters (arXiv 2106.09685) of the layers that it names. They alone train and stand
            in a checkpoint, which then needs the folder; another folder's weights are refused.
        dtype: Type of the weights that do not train. Adapters are float32. Without ``lora`` it must
            be float32.
        activation_checkpointing: Recompute each block in the backward pass.
        fps: Frames per second of the clips, which LTX's positions take and others do not.

    Raises ``ValueError`` for a folder without such a network or its weights, and for adapters that
    match no layer.
    """
    folder = part_of_pipeline(Path(folder), "transformer")
    config = read_config(folder, _KINDS, "a denoiser", "a video transformer", "transformer")
    if lora is None and dtype != "float32":
        raise ValueError(f"dtype = {dtype!r}: all weights train, in float32; it is for lora alone")
    on_meta = torch.empty(0).is_meta
    with torch.device("meta"):  # no weights are drawn before others are read
        denoiser = configured_denoiser(config, activation_checkpointing, fps)
    if not on_meta:
        denoiser.network = read_network(folder, denoiser.network_class, getattr(torch, dtype))
        denoiser.set_activation_checkpointing()
    if lora is not None:
        add_lora(denoiser, lora)
        arguments = {"folder": str(folder), "lora": described(lora), "dtype": dtype}
        denoiser.specification = _specification(pretrained_denoiser, denoiser, **arguments)
    return denoiser.train()


def configured_denoiser(
    config: Config, activation_checkpointing: bool = False, fps: float = 25.0
) -> PretrainedDenoiser:
    """Return a video transformer of this configuration with random weights.

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


class PretrainedDenoiser(Denoiser):
    """A network of diffusers behind the interface of denoisers.

    Args:
        config: The network's configuration, as its ``config.json`` has it.
        activation_checkpointing: Recompute each block in the backward pass.
        fps: Frames per second of the clips, which LTX's positions take and others do not.
    """

    network_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    times_of_tokens: ClassVar[bool] = False

    def __init__(self, config: Config, activation_checkpointing: bool, fps: float):
        network = diffusers_class(self.network_class).from_config(config)
        super().__init__(self.patch_of(network.config))
        takes, gives = network.config.in_channels, network.config.out_channels
        if takes != (gives or takes):
            raise ValueError(
                f"{self.network_class} takes {takes} channels and predicts {gives}: only networks "
                "from text to video are supported"
            )
        self.network = network
        self.activation_checkpointing, self.fps = activation_checkpointing, fps
        self.specification: dict[str, Any] = {}
        self.set_activation_checkpointing()

    def set_activation_checkpointing(self) -> None:
        """Make the network recompute its blocks, if ``activation_checkpointing`` says so."""
        if self.activation_checkpointing:
            self.network.enable_gradient_checkpointing()

    def factory(self, latent_channels: int, condition_width: int) -> partial[Denoiser]:
        """See ``Denoiser``."""
        for what, ours, theirs in (
            ("the tokenizer has {} latent channels", latent_channels, self.latent_channels),
            ("the conditioner's tokens have width {}", condition_width, self.text_width),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{what.format(ours)}, and this {self.network_class} takes {theirs}"
                )
        made_by: type[Denoiser] = type(self)
        return partial(made_by, **self.arguments)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the network takes."""
        return self.network.config.in_channels

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return self.network.config.num_layers

    @property
    def width(self) -> int:
        """Channels of the tokens within the blocks."""
        return self.network.config.num_attention_heads * self.network.config.attention_head_dim

    @staticmethod
    @abstractmethod
    def patch_of(config: Any) -> Patch:
        """Return the patch of a network of this configuration."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the text tokens that the network takes."""

    @abstractmethod
    def predict(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        tokens: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b c f h w"]:
        """Return the network's prediction for a batch of clips of one size."""

    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"] | PackedLatents,
        t: Float[Tensor, "*times"],
        condition: Condition,
    ) -> Float[Tensor, "b c f h w"] | PackedLatents:
        """See ``Denoiser.forward``. Clips of a pack are seen one by one.

        Raises ``ValueError`` for a time of each token where the network takes one of each clip, and
        for channels beside the latents.
        """
        if isinstance(x_t, PackedLatents):
            return clip_by_clip(self, x_t, t, condition)
        if condition.concat_latents is not None:
            raise ValueError(f"{self.network_class} takes no channels beside the latents")
        if t.ndim > 1 and not self.times_of_tokens:
            raise ValueError(
                f"{self.network_class} takes one time for each clip: known frames at time zero are "
                "not for it"
            )
        dtype = self.network.dtype
        output = self.predict(x_t.to(dtype), t, condition.tokens.to(dtype), condition.mask)
        return output.to(x_t.dtype)


class WanDenoiser(PretrainedDenoiser):
    """``WanTransformer3DModel`` of Wan 2.1 and 2.2 (arXiv 2503.20314), from text to video.

    It attends to 512 text tokens, of which those after a caption's end are zeros.
    """

    network_class = "WanTransformer3DModel"
    pipeline_class = "WanPipeline"
    times_of_tokens = True
    num_text_tokens: ClassVar[int] = 512

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch.of(config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.text_dim

    def predict(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        tokens: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        text = _exactly(self.num_text_tokens, tokens * mask[..., None])
        return self.network(x_t, t * _NUM_STEPS, text, return_dict=False)[0]


class LTXDenoiser(PretrainedDenoiser):
    """``LTXVideoTransformer3DModel`` of LTX-Video (arXiv 2501.00103), from text to video.

    Its positions are in seconds and pixels: ``compression`` is that of its autoencoder in frames,
    rows and columns.
    """

    network_class = "LTXVideoTransformer3DModel"
    pipeline_class = "LTXPipeline"
    times_of_tokens = True

    compression: ClassVar[tuple[int, int, int]] = (8, 32, 32)

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch(config.patch_size_t, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.caption_channels

    def predict(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        tokens: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        grid = self.patch.grid(*x_t.shape[2:])
        parts = {"p": self.patch.f, "q": self.patch.h, "r": self.patch.w}
        x = rearrange(x_t, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", **parts)
        frames, *pixels = self.compression
        output = self.network(
            x,
            tokens,
            t * _NUM_STEPS,
            mask.to(x),
            num_frames=grid.f,
            height=grid.h,
            width=grid.w,
            rope_interpolation_scale=(frames / self.fps, *pixels),
            return_dict=False,
        )[0]
        pattern = "b (f h w) (c p q r) -> b c (f p) (h q) (w r)"
        return rearrange(output, pattern, f=grid.f, h=grid.h, w=grid.w, **parts)


class CogVideoXDenoiser(PretrainedDenoiser):
    """``CogVideoXTransformer3DModel`` of CogVideoX 2B and 5B (arXiv 2408.06072), text to video.

    It attends to all of its text tokens, those of padding included: the conditioner should encode
    these, as ``PretrainedText`` with ``padded``; missing ones are zeros.
    """

    network_class = "CogVideoXTransformer3DModel"
    pipeline_class = "CogVideoXPipeline"

    @staticmethod
    def patch_of(config: Any) -> Patch:
        if config.patch_size_t is not None:
            raise ValueError("CogVideoX 1.5 is not supported: its tokens hold several frames")
        return Patch(1, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.text_embed_dim

    def predict(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        tokens: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``. Step n of the schedule, counted from 0, has time (n + 1) /
        1000.
        """
        output = self.network(
            rearrange(x_t, "b c f h w -> b f c h w"),
            _exactly(self.network.config.max_text_seq_length, tokens),
            t * _NUM_STEPS - 1,
            image_rotary_emb=self._rotary(x_t),
            return_dict=False,
        )[0]
        return rearrange(output, "b f c h w -> b c f h w")

    def _rotary(self, x_t: Float[Tensor, "b c f h w"]) -> tuple[Tensor, Tensor] | None:
        config = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        embeddings = import_module("diffusers.models.embeddings")
        pipeline = import_module("diffusers.pipelines.cogvideo.pipeline_cogvideox")
        grid, p = self.patch.grid(*x_t.shape[2:]), config.patch_size
        crop = pipeline.get_resize_crop_region_for_grid(
            (grid.h, grid.w), config.sample_width // p, config.sample_height // p
        )
        return embeddings.get_3d_rotary_pos_embed(
            config.attention_head_dim, crop, (grid.h, grid.w), grid.f, device=x_t.device
        )


_KINDS: dict[str, type[PretrainedDenoiser]] = {
    kind.network_class: kind for kind in (WanDenoiser, LTXDenoiser, CogVideoXDenoiser)
}


def _exactly(length: int, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b n d"]:
    """Return the tokens with zeros appended up to ``length``. ``ValueError`` for more of them."""
    missing = length - tokens.shape[1]
    if missing < 0:
        raise ValueError(
            f"{tokens.shape[1]} text tokens, and the network takes {length}: set the conditioner's "
            f"max_tokens to {length}"
        )
    zero = tokens.new_zeros(())
    return torch.cat(
        [tokens, repeat(zero, "-> b n d", b=len(tokens), n=missing, d=tokens.shape[2])], 1
    )
