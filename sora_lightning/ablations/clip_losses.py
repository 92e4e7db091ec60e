"""The loss of each validation clip of a trained model, at times and noise that every run shares."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jsonargparse import ArgumentParser, auto_cli
from torch import Tensor

from sora_lightning.cli.errors import filter_warnings
from sora_lightning.cli.sources import read_yaml
from sora_lightning.data import VideoDataModule
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.draws import GroupDraws, make_rng
from sora_lightning.types import Compression, PackedLatents, VideoBatch, VideoSize
from sora_lightning.workflows.stages import last_checkpoint

FIELDS = ("clip", "loss", "displacement", "size", "file")


def write_clip_losses(
    run: Path, output: Path, num_draws: int = 16, overrides: dict[str, Any] | None = None
) -> None:
    """Write a CSV with the loss of each validation clip of a run, how far its shapes move, the size
    it is seen at, and its file.

    The averaged weights of the last checkpoint are measured. Draw k of a clip has a time in the
    k-th of ``num_draws`` equal parts of [0, 1]; time and noise depend on the clip's name and k
    alone. ``displacement`` is in tokens per latent frame; it is empty for clips that were not
    rendered by ``synthesize``.

    Args:
        run: The run_dir of a training of a ``DiffusionSystem``.
        output: The CSV.
        num_draws: Times and noises for each clip.
        overrides: Values by dotted key, ``data.`` first, in place of those that the run had.
    """
    system = DiffusionSystem.from_checkpoint(last_checkpoint(run))
    data = _validation_data(run, overrides or {})
    facts = dict(_facts(system, data))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        batches: Any = data.val_dataloader()
        for batch in batches:
            losses = clip_losses(system, batch, num_draws)
            for clip, loss in zip(batch.clip_ids, losses.tolist(), strict=True):
                writer.writerow({"clip": clip, "loss": loss} | facts[clip])


@torch.no_grad()
def clip_losses(system: DiffusionSystem, batch: VideoBatch, num_draws: int) -> Float[Tensor, " b"]:
    """Return the mean loss of each clip over ``num_draws`` times and noises."""
    x_0, condition = system.latents(batch), system.conditioner(batch.captions)
    losses, network = [], system.network()
    for draw in range(num_draws):
        rngs = [make_rng(x_0.device, "clip losses", name, draw) for name in batch.clip_ids]
        draws = GroupDraws(rngs, 1)
        t = ((draw + draws.uniform()) / num_draws).clamp(1e-3, 1 - 1e-3)
        noise = torch.stack(draws.noise(PackedLatents(tuple(x_0))).clips)
        losses.append(system.objective(network, x_0, noise, t, condition))
    return torch.stack(losses).mean(0)


def displacement(
    scene: Mapping[str, Any], token: Compression, size: VideoSize, fps: float
) -> float:
    """Return how many tokens the fastest shape of a scene moves from one latent frame to the next.

    ``token`` are the pixels of a token. A rate is in short sides per second, and the short side of
    a clip is that of its size.
    """
    rate = max(float(shape["rate"]) for shape in scene["shapes"])
    side = min(size.height / token.height, size.width / token.width)
    return rate * side * token.frames / fps


def _facts(system: DiffusionSystem, data: VideoDataModule) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each validation clip's name with its displacement, size and file."""
    token = system.denoiser.patch.compress(system.tokenizer.compression)
    assert data.val_manifest is not None
    for size, records in data.check()[data.val_manifest].clips.items():
        for record in records:
            scene = record.columns.get("scene")
            moved = displacement(scene, token, size, data.fps) if scene else None
            yield record.clip_id, {"displacement": moved, "size": size, "file": record.path.name}


def _validation_data(run: Path, overrides: Mapping[str, Any]) -> VideoDataModule:
    config = read_yaml(run / "config.yaml")
    for key, value in overrides.items():
        *owners, last = key.split(".")
        functools.reduce(lambda node, owner: node[owner], owners, config)[last] = value
    values = config["data"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VideoDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": values})).data
    data.setup("validate")
    return data


if __name__ == "__main__":
    filter_warnings()
    auto_cli(write_clip_losses, as_positional=False)
