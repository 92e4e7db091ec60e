"""Videos from a checkpoint: samples for its prompts, and real clips through its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from evaluation.checks import Request
from evaluation.video_features import Reconstruct
from sora_lightning.checkpoints import load_tokenizer, read_checkpoint
from sora_lightning.cli.expansion import Expansion
from sora_lightning.cli.sample import Request as SampleRequest
from sora_lightning.cli.sample import sample
from sora_lightning.files import file_sha256
from sora_lightning.generation import GuidanceConfig, SamplingConfig
from sora_lightning.types import as_levels


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return path, hash and step of a checkpoint, for the report."""
    content = read_checkpoint(checkpoint)
    return {
        "path": str(checkpoint),
        "sha256": file_sha256(checkpoint),
        "step": int(content.get("global_step", 0)),
    }


def sample_videos(request: Request) -> None:
    """Sample a video for each evaluated caption with ``sora_lightning``'s command.

    An interrupted run is resumed.
    """
    assert request.checkpoint is not None
    clips, sampling = request.protocol.clips, request.protocol.sampling
    sample(
        checkpoint=request.checkpoint,
        output=request.output / "videos",
        request=SampleRequest(
            prompts=_captions(request),
            size=",".join(clips.sizes),
            num_frames=clips.num_frames,
            seed=sampling.seed,
            prompt_column=request.prompt_column,
        ),
        sampling=SamplingConfig(
            num_steps=sampling.num_steps, guidance=GuidanceConfig(sampling.guidance_scale)
        ),
        device=request.device,
        expansion=Expansion(expand=request.expand, no_expand=request.expand is None),
    )


def _captions(request: Request) -> Path:
    """File of the captions to sample: the reference's own, or a copy of its first captions."""
    number = request.protocol.scores.num_generated
    rows = [row for row in request.prompts.read_text(encoding="utf-8").splitlines() if row.strip()]
    if number is None or number >= len(rows):
        return request.prompts
    first = request.output / "captions.jsonl"
    request.output.mkdir(parents=True, exist_ok=True)
    first.write_text("".join(row + "\n" for row in rows[:number]), encoding="utf-8")
    return first


def through_tokenizer(checkpoint: Path, device: str) -> Reconstruct:
    """Return a function that encodes and decodes with the checkpoint's tokenizer."""
    tokenizer = load_tokenizer(checkpoint).to(device).eval()

    def reconstruct(batch: UInt8[Tensor, "b 3 F H W"]) -> UInt8[Tensor, "b 3 F H W"]:
        pixels = tokenizer.decode(tokenizer.encode(batch.to(device).float() / 127.5 - 1))
        return as_levels(pixels.cpu())

    return reconstruct
