"""Writes fine-tuned public networks, or their adapters, as folders that diffusers loads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sora_lightning.denoisers.lora import adapter_state, merge_adapters
from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser
from sora_lightning.diffusers_folders import diffusers_class
from sora_lightning.files import check_new_folder, follow_umask, new_folder
from sora_lightning.systems import DiffusionSystem, PretrainedSystem


def write_diffusers(checkpoint: Path, output: Path) -> str:
    """Write the denoiser of a run, with averaged weights, and return one line about the result.

    Adapters become a file that ``load_lora_weights`` of the network's pipeline reads. A network
    that trained as a whole becomes the folder of a pipeline, whose other parts are those of the
    folder that it was trained from. So does one whose class loads no adapters, with them merged. If
    other parts were exchanged too, the network alone is written, as its class reads it.

    Raises ``ValueError`` for a checkpoint whose denoiser is not one of diffusers, and where the
    output exists.
    """
    check_new_folder(output)
    system = DiffusionSystem.from_checkpoint(checkpoint)
    denoiser = system.denoiser
    if not isinstance(denoiser, PretrainedDenoiser):
        raise ValueError(
            f"--input {checkpoint}: its denoiser is a {type(denoiser).__name__}: only networks of "
            "diffusers, from pretrained_denoiser, are written for diffusers"
        )
    with new_folder(output) as folder:
        return f"{output}: {_write(system, denoiser, folder)}"


def _write(system: DiffusionSystem, denoiser: PretrainedDenoiser, output: Path) -> str:
    """Write what ``write_diffusers`` writes, and say what it is."""
    adapters, metadata = adapter_state(denoiser.network)
    if not adapters or not hasattr(denoiser.network, "load_lora_adapter"):
        merge_adapters(denoiser.network)
        if isinstance(system, PretrainedSystem) and system.is_pipelines:
            _write_pipeline(system.pipeline.path, denoiser.network, output)
            return f"a {system.pipeline.name} with the trained {denoiser.network_class}"
        denoiser.network.save_pretrained(output)
        follow_umask(output)
        return f"{denoiser.network_class}, in place of that in a pipeline's folder"
    pipeline = diffusers_class(denoiser.pipeline_class)
    pipeline.save_lora_weights(
        output,
        transformer_lora_layers=adapters,
        transformer_lora_adapter_metadata=metadata,
    )
    follow_umask(output)
    return f"{len(adapters)} tensors for load_lora_weights of {denoiser.pipeline_class}"


def _write_pipeline(folder: Path, network: Any, output: Path) -> None:
    """Write a pipeline's folder with another network.

    Other weights are hard links where the file system has them, or else copies.
    """
    index = json.loads((folder / "model_index.json").read_text())
    for name in index:
        if name in ("transformer", "unet"):
            network.save_pretrained(output / name)
            follow_umask(output / name)
        elif (folder / name).is_dir():
            shutil.copytree(folder / name, output / name, copy_function=_link_weights)
    shutil.copy(folder / "model_index.json", output)


def _link_weights(source: str, target: str) -> None:
    """Copy a file, or link it if it holds weights."""
    real = Path(source).resolve()  # the hub's cache has symbolic links
    if target.endswith(".safetensors"):
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(real, target)
            return
    shutil.copy(real, target)
