"""Tiny pipelines of diffusers with random weights, saved as public ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.conditioning.text_folders import t5_folder

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
LTX = {**_SMALL, "attention_head_dim": 16, "caption_channels": 16, "cross_attention_dim": 32}
COG = {
    **{**_SMALL, "attention_head_dim": 16, "text_embed_dim": 16, "time_embed_dim": 8},
    **{"sample_width": 4, "sample_height": 4, "sample_frames": 9, "max_text_seq_length": 226},
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
PARTS: dict[str, tuple[str, Any, Any, Any]] = {
    "Wan": (
        "UMT5",
        (diffusers.AutoencoderKLWan, WAN_VAE),
        (diffusers.WanTransformer3DModel, WAN),
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
}


def network(name: str, **changes: Any) -> Any:
    """The transformer of a pipeline with weights that reach its output."""
    torch.manual_seed(0)
    kind, config = PARTS[name][2]
    built = kind(**{**config, **changes}).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def pipeline_folder(name: str, folder: Path) -> Any:
    """Save a whole tiny pipeline in ``folder``, and return it as diffusers reads it."""
    text, (vae, vae_config), _, (scheduler, scheduler_config) = PARTS[name]
    transformer = network(name)
    t5_folder(folder / "all", text)
    kind = getattr(transformers, f"{text}EncoderModel")
    made = getattr(diffusers, f"{name}Pipeline")(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "all"),
        text_encoder=kind.from_pretrained(folder / "all", dtype=torch.float32),
        vae=vae(**vae_config),
        transformer=transformer,
        scheduler=scheduler(**scheduler_config),
    )
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made
