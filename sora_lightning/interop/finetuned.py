"""Writes fine-tuned public networks, or their adapters, as folders that diffusers loads."""

from __future__ import annotations

from pathlib import Path

from sora_lightning.denoisers.lora import adapter_state, merge_adapters
from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser
from sora_lightning.diffusers_folders import diffusers_class
from sora_lightning.files import check_writable
from sora_lightning.systems import DiffusionSystem


def write_diffusers(checkpoint: Path, output: Path) -> str:
    """Write the denoiser of a run, with averaged weights, and return one line about the result.

    Adapters become a file that ``load_lora_weights`` of the network's pipeline reads. A network
    that trained as a whole becomes a folder that its class's ``from_pretrained`` reads: it replaces
    the one in a pipeline's folder. So does one whose class loads no adapters, with them merged.

    Raises ``ValueError`` for a checkpoint whose denoiser is not one of diffusers, and where the
    output exists.
    """
    if output.exists():
        raise ValueError(f"--output {output}: exists; name a folder to be made")
    try:
        check_writable(output)
    except ValueError as error:
        raise ValueError(f"--output {error}") from error
    denoiser = DiffusionSystem.from_checkpoint(checkpoint).denoiser
    if not isinstance(denoiser, PretrainedDenoiser):
        raise ValueError(
            f"--input {checkpoint}: its denoiser is a {type(denoiser).__name__}: only networks of "
            "diffusers, from pretrained_denoiser, are written for diffusers"
        )
    adapters, metadata = adapter_state(denoiser.network)
    if not adapters or not hasattr(denoiser.network, "load_lora_adapter"):
        merge_adapters(denoiser.network)
        denoiser.network.save_pretrained(output)
        return f"{output}: {denoiser.network_class}, in place of that in a pipeline's folder"
    pipeline = diffusers_class(denoiser.pipeline_class)
    pipeline.save_lora_weights(
        output,
        transformer_lora_layers=adapters,
        transformer_lora_adapter_metadata=metadata,
    )
    return f"{output}: {len(adapters)} tensors for load_lora_weights of {denoiser.pipeline_class}"
