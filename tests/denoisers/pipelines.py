"""Tiny pipelines of diffusers with random weights, saved as public ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.conditioning.text_folders import clip_folder, llama_folder, t5_folder

WAN_VAE = {
    **{"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1},
    **{"temperal_downsample": [True, True], "scale_factor_spatial": 4},
    **{"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]},
}
# The ratios 8 and 32 of the public autoencoder, by which the transformer's positions are scaled.
LTX_VAE = {
    **{"block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4},
    **{"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "latent_channels": 4},
}
COG_VAE = {
    **{"block_out_channels": (4, 4, 8), "layers_per_block": 1, "norm_num_groups": 2},
    **{"down_block_types": ("CogVideoXDownBlock3D",) * 3, "latent_channels": 4},
    **{"up_block_types": ("CogVideoXUpBlock3D",) * 3, "temporal_compression_ratio": 4},
}
_SMALL = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}
WAN = {**_SMALL, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
# From image to video: four channels of the mask and four of the image's latents beside the others.
WAN_IMAGE = {**WAN, "in_channels": 12, "image_dim": 12, "added_kv_proj_dim": 24}
LTX = {**_SMALL, "attention_head_dim": 16, "caption_channels": 16, "cross_attention_dim": 32}
COG = {
    **{**_SMALL, "attention_head_dim": 16, "text_embed_dim": 16, "time_embed_dim": 8},
    **{"sample_width": 4, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 226},
}
HUNYUAN = {
    **{**_SMALL, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    **{"attention_head_dim": 8, "text_embed_dim": 16, "pooled_projection_dim": 16},
    **{"rope_axes_dim": (2, 2, 4)},
}
HUNYUAN_VAE = {
    **{"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "latent_channels": 4},
    **{"norm_num_groups": 2},
}
# As the public configuration, beside the sizes.
LATTE = {
    **{**_SMALL, "out_channels": 8, "attention_head_dim": 8, "attention_bias": True},
    **{"cross_attention_dim": 16, "caption_channels": 16, "patch_size": 2, "sample_size": 8},
    **{"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6},
    **{"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "video_length": 3},
}
IMAGE_VAE = {
    **{"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4},
    **{"up_block_types": ("UpDecoderBlock2D",) * 2},
}
UNET = {
    **{"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 4},
    **{"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 16},
}
FLOW = {"shift": 3.0}
LTX_FLOW = {
    **{"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05},
    **{"base_image_seq_len": 1024, "max_image_seq_len": 4096},
}
COG_DDIM = {
    **{"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    **{"snr_shift_scale": 3.0, "timestep_spacing": "trailing", "beta_start": 0.00085},
    **{"beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False},
}
DDIM = {"beta_schedule": "linear", "clip_sample": False, "steps_offset": 1}
UNET_DDIM = {**DDIM, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
I2VGEN_DDIM = {
    **{**DDIM, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    **{"rescale_betas_zero_snr": True, "set_alpha_to_one": True},
}
# The recipes of experiments/finetune, which each read a folder of models/.
RECIPES = {"wan": "Wan", "ltx": "LTX", "cogvideox": "CogVideoX", "i2vgen_xl": "I2VGenXL"}
PARTS: dict[str, tuple[str, Any, Any, Any]] = {
    "Wan": (
        "UMT5",
        (diffusers.AutoencoderKLWan, WAN_VAE),
        (diffusers.WanTransformer3DModel, WAN),
        (diffusers.FlowMatchEulerDiscreteScheduler, FLOW),
    ),
    "WanImageToVideo": (
        "UMT5",
        (diffusers.AutoencoderKLWan, WAN_VAE),
        (diffusers.WanTransformer3DModel, WAN_IMAGE),
        (diffusers.FlowMatchEulerDiscreteScheduler, FLOW),
    ),
    "LTX": (
        "T5",
        (diffusers.AutoencoderKLLTXVideo, LTX_VAE),
        (diffusers.LTXVideoTransformer3DModel, LTX),
        (diffusers.FlowMatchEulerDiscreteScheduler, LTX_FLOW),
    ),
    "CogVideoX": (
        "T5",
        (diffusers.AutoencoderKLCogVideoX, COG_VAE),
        (diffusers.CogVideoXTransformer3DModel, COG),
        (diffusers.CogVideoXDDIMScheduler, COG_DDIM),
    ),
    "HunyuanVideo": (
        "Llama",
        (diffusers.AutoencoderKLHunyuanVideo, HUNYUAN_VAE),
        (diffusers.HunyuanVideoTransformer3DModel, HUNYUAN),
        (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 7.0}),
    ),
    "Latte": (
        "T5",
        (diffusers.AutoencoderKL, IMAGE_VAE),
        (diffusers.LatteTransformer3DModel, LATTE),
        (diffusers.DDIMScheduler, DDIM),
    ),
    "TextToVideoSD": (
        "CLIP",
        (diffusers.AutoencoderKL, IMAGE_VAE),
        (diffusers.UNet3DConditionModel, UNET),
        (diffusers.DDIMScheduler, UNET_DDIM),
    ),
    "I2VGenXL": (
        "CLIP",
        (diffusers.AutoencoderKL, IMAGE_VAE),
        (diffusers.I2VGenXLUNet, UNET),
        (diffusers.DDIMScheduler, I2VGEN_DDIM),
    ),
}


def network(name: str, **changes: Any) -> Any:
    """The denoiser of a pipeline with weights that reach its output."""
    torch.manual_seed(0)
    kind, config = PARTS[name][2]
    built = kind(**{**config, **changes}).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def pipeline_folder(name: str, folder: Path) -> Any:
    """Save a whole tiny pipeline in ``folder``, and return it as diffusers reads it."""
    text, (vae, vae_config), (kind, _), (scheduler, scheduler_config) = PARTS[name]
    denoiser = "unet" if "UNet" in kind.__name__ else "transformer"
    made = getattr(diffusers, f"{name}Pipeline")(
        vae=vae(**vae_config).eval(),
        scheduler=scheduler(**scheduler_config),
        **{denoiser: network(name)},
        **_text_encoders(name, text, folder / "all"),
    )
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def _text_encoders(name: str, text: str, folder: Path) -> dict[str, Any]:
    """Encoders of a pipeline, its image's among them, and what prepares their input."""
    tokenizer = transformers.AutoTokenizer.from_pretrained
    if text == "CLIP":
        clip_folder(folder, context=77, projection=16)
        parts = {"text_encoder": transformers.CLIPTextModel.from_pretrained(folder)}
        if name == "I2VGenXL":
            tower = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
            side = {"height": 16, "width": 16}
            parts["feature_extractor"] = transformers.CLIPImageProcessor(size=side, crop_size=side)
            parts["image_encoder"] = tower
        return {**parts, "tokenizer": tokenizer(folder)}
    if text == "Llama":
        llama, clip = llama_folder(folder / "llama"), clip_folder(folder / "clip", context=77)
        return {
            "text_encoder": transformers.LlamaModel.from_pretrained(llama),
            "tokenizer": tokenizer(llama),
            "text_encoder_2": transformers.CLIPTextModel.from_pretrained(clip),
            "tokenizer_2": tokenizer(clip),
        }
    kind = getattr(transformers, f"{text}EncoderModel")
    t5_folder(folder, text)
    encoder = kind.from_pretrained(folder, dtype=torch.float32)
    parts = {"text_encoder": encoder, "tokenizer": tokenizer(folder)}
    if name == "WanImageToVideo":  # 16 x 16 patches and one state of the image: 257, as ViT-H/14
        side = {"height": 32, "width": 32}
        config = transformers.CLIPVisionConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
            image_size=32, patch_size=2,
        )  # fmt: skip
        parts["image_encoder"] = transformers.CLIPVisionModel(config).eval()
        parts["image_processor"] = transformers.CLIPImageProcessor(size=side, crop_size=side)
    return parts
