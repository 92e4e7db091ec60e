"""The verb ``sample``: prompts in, or prompts and videos; mp4 files out; by a checkpoint alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sora_lightning.cli.contact_sheet import contact_sheet, moving_sheet, save_animation
from sora_lightning.cli.geometry import check_size
from sora_lightning.cli.guidance import GuidanceArguments
from sora_lightning.cli.prompts import Prompt, read_prompts
from sora_lightning.cli.quiet import quieten
from sora_lightning.cli.sample_tasks import (
    PICTURES,
    SAMPLERS,
    FrameArguments,
    Request,
    SamplerName,
    TaskName,
    check_arguments,
    run_task,
)
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.decoding.readers import PyAVReader, read_timeline
from sora_lightning.denoisers import FeatureCaching
from sora_lightning.files import file_sha256
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers import Tiling
from sora_lightning.types import VideoSize, as_levels


@dataclass(frozen=True)
class Sample:
    """A video to make, and all that decides what it shows: a row of ``prompts.jsonl``."""

    path: str
    prompt: str
    seed: int
    size: str
    fps: float
    num_steps: int
    guidance_scale: float
    sampler: str
    checkpoint_sha256: str
    tile: int | None = None
    tile_overlap: int | None = None
    guidance_interval: str | None = None
    guidance_rescale: float | None = None
    guidance_channels: int | None = None
    guide_sha256: str | None = None
    cache_interval: int = 1


def sample(
    checkpoint: Path,
    output: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    size: str = "32x32",
    num_frames: int = 17,
    seed: int = 0,
    num_steps: int = 50,
    guidance_scale: float = 2.0,
    batch_size: int = 16,
    device: str = "cpu",
    sheet_rows: int = 12,
    sampler: SamplerName = "euler",
    task: TaskName = "text",
    video: Path | None = None,
    to: Path | None = None,
    mask: Path | None = None,
    frames: int | None = None,
    total_frames: int | None = None,
    strength: float | None = None,
    frame_noise: float | None = None,
    frame_guidance: float | None = None,
    tile: int | None = None,
    tile_overlap: int | None = None,
    source_prompt: str | None = None,
    cache_interval: int = 1,
    guidance_interval: str | None = None,
    guidance_rescale: float | None = None,
    guidance_channels: int | None = None,
    guide: Path | None = None,
) -> None:
    """Make videos from sentences, or from sentences and videos, with a trained checkpoint; neither
    the YAML nor the data is needed.

    Args:
        checkpoint: A checkpoint of a text-to-video training, say
            runs/demo/text_to_video/checkpoints/last.ckpt.
        output: With --prompt the mp4 file; with --prompts a folder for the videos, prompts.jsonl
            and contact_sheet.png. What the folder holds already of the same settings is kept.
        prompt: What the video shows, in a sentence.
        prompts: A text file with a prompt a line, or a manifest (.jsonl), whose captions are the
            prompts and whose clips' proportions choose among the sizes.
        size: Height x width in pixels. Several, for a manifest to choose among: 32x32,24x40.
        num_frames: Frames of each video. The rate is that of the training.
        seed: Of the noise: video number i of the prompts takes seed + i, whatever batch it is in.
        num_steps: Steps of the sampler.
        guidance_scale: Weight of the prompt; 1 is no guidance.
        batch_size: Videos made at a time.
        device: Where to compute: cpu, cuda, cuda:1.
        sheet_rows: Videos in the contact sheet, evenly spread over the prompts.
        sampler: The method that goes from noise to data.
        task: What to make of --prompt: a video (text), a still image, a picture that moves
            (animate), what follows or precedes --video (extend, extend-backward), a way from
            --video to another one (connect) or back to its own start (loop), a part of it anew
            (inpaint), it as the prompt says (edit), it changed as the prompt asks (instruct, for a
            training with sources), or a video in windows longer than the training (long).
        video: The video, or for animate the picture, that the task starts from.
        to: The video that connect ends with.
        mask: A video or picture that is white where inpaint is to paint.
        frames: Frames of context that each window sees, 1 + a multiple of the frames in a latent
            frame. By default two latent frames.
        total_frames: Frames of the result. By default one window adds what it has room for.
        strength: How much of the video edit may change, from 0 (nothing) to 1 (everything).
        frame_noise: Diffusion time at which the context is seen; 0 is clean.
        frame_guidance: Weight of the context, or of the video that instruct changes, beside that of
            the prompt, in a third call a step.
        tile: Side in pixels of the tiles by which the tokenizer decodes frames that are too large
            for the memory. By default each frame is decoded whole.
        tile_overlap: Pixels that neighbouring tiles share and are blended over; by default a
            quarter of the tile.
        source_prompt: What --video shows before the edit: then only what --prompt differs in
            changes.
        cache_interval: The sampler computes the middle blocks at every so many steps only; 1
            computes all.
        guidance_interval: Two times with a comma between, 0.1,0.8 say (0 is data, 1 is noise):
            guidance acts between them only, outside of them the prompt alone.
        guidance_rescale: Share, from 0 to 1, in which guidance keeps the deviation of the
            prediction that it starts from; a large scale overexposes otherwise.
        guidance_channels: How many of the latents' channels are guided, the first ones; DiT guides
            3 of 4.
        guide: A checkpoint of a weaker model on the same latents, smaller or trained for less
            time: guidance then leads away from it, in place of no caption.
    """
    quieten()
    given = FrameArguments(
        *(video, to, mask, frames, total_frames),
        *(strength, frame_noise, frame_guidance, source_prompt),
    )
    caching = None if cache_interval == 1 else FeatureCaching(cache_interval)
    check_arguments(task, given)
    guiding = GuidanceArguments(
        *(guidance_scale, guidance_interval, guidance_rescale, guidance_channels),
        *(guide, frame_guidance),
    )
    num_frames = 1 if task == "image" else num_frames
    sizes = [VideoSize.parse(f"{num_frames}x{one}") for one in size.split(",")]
    asked = _asked(prompt, prompts, sizes)
    if tile is None and tile_overlap is not None:
        raise ValueError(f"--tile-overlap {tile_overlap}: needs --tile")
    tiling = None if tile is None else Tiling(tile, tile_overlap or tile // 4)
    if task != "text" and prompts is not None:
        raise ValueError(f"--prompts {prompts}: --task {task} takes one --prompt")
    _check_output(output, prompts is None, PICTURES if task == "image" else (".mp4",))
    if not checkpoint.is_file():
        raise ValueError(f"--checkpoint {checkpoint}: no such file")
    system = DiffusionSystem.from_checkpoint(checkpoint).to(device).eval()
    guiding.check_against(system)
    if task == "instruct" and not system.has_sources:
        raise ValueError(
            f"--task instruct: {checkpoint} was not trained on edits (its tasks have no Source)"
        )
    more: dict[str, Any] = {
        "guidance": guiding.recipe(),
        "guide": guiding.loaded_guide(system, device),
        "caching": caching,
    }
    if tiling is not None:
        system.tokenizer = tiling(system.tokenizer)
    for one in sizes:
        check_size("--size", one, system.tokenizer.compression, system.denoiser.patch)
    tiles = (None, None) if tiling is None else (tiling.tile, tiling.overlap)
    settings = (
        *(system.fps, num_steps, guidance_scale, sampler, file_sha256(checkpoint), *tiles),
        *(guidance_interval, guidance_rescale, guidance_channels),
        *(None if guide is None else file_sha256(guide), cache_interval),
    )
    plan = [
        Sample(_file_name(i, one.text), one.text, seed + i, str(one.size), *settings)
        for i, one in enumerate(asked)
    ]
    if task != "text":
        generator = system.generator(
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            sampler=SAMPLERS[sampler],
            frame_guidance=frame_guidance,
            **more,
        )
        request = Request(generator, plan[0].prompt, seed, sizes[0], system.fps, given)
        _write(output, to_frames(run_task(task, request)[None])[0], system.fps)
        print(output)
    elif prompts is None:
        _sample_file(system, plan[0], output, more)
        print(output)
    else:
        _sample_folder(system, plan, output, batch_size, more)
        _write_sheet(plan, output, sheet_rows)
        print(f"{len(plan)} videos, prompts.jsonl and contact_sheet.png in {output}")


def _asked(prompt: str | None, prompts: Path | None, sizes: list[VideoSize]) -> list[Prompt]:
    if (prompt is None) == (prompts is None):
        raise ValueError('give either --prompt "..." or --prompts FILE')
    if prompts is not None:
        return read_prompts(prompts, sizes)
    if not str(prompt).strip():
        raise ValueError(f"--prompt {prompt!r}: is empty")
    return [Prompt(str(prompt).strip(), sizes[0])]


def _check_output(output: Path, single: bool, suffixes: tuple[str, ...]) -> None:
    if single and output.suffix not in suffixes:
        what = "video" if ".mp4" in suffixes else "image"
        raise ValueError(
            f"--output {output}: a single {what} is written to a file that ends in {suffixes[0]}"
        )
    if not single and output.is_file():
        raise ValueError(f"--output {output}: is a file; with --prompts it must be a folder")


def _sample_file(system: DiffusionSystem, one: Sample, output: Path, more: dict[str, Any]) -> None:
    for _, video in _generate(system, [one], 1, more):
        _write(output, video, one.fps)


def _write(output: Path, frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix in PICTURES:
        Image.fromarray(frames[0]).save(output)
    else:
        write_video(output, frames, fps)


def _sample_folder(
    system: DiffusionSystem,
    plan: list[Sample],
    folder: Path,
    batch_size: int,
    more: dict[str, Any],
) -> None:
    """Write what is not there yet. Each video is in ``prompts.jsonl`` as soon as its file is
    complete."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "prompts.jsonl"
    done = _finished(record, plan)
    record.write_text("".join(_row(one) for one in plan if one in done))
    left = [one for one in plan if one not in done]
    with (
        tqdm(total=len(plan), initial=len(done), desc="videos", unit="video") as bar,
        record.open("a") as rows,
    ):
        for one, video in _generate(system, left, batch_size, more):
            write_video(folder / one.path, video, one.fps)
            rows.write(_row(one))
            rows.flush()
            bar.update()
    record.write_text("".join(_row(one) for one in plan))


# What a row of before a setting existed was made with.
_UNSAID = {one.name: one.default for one in fields(Sample) if one.default is not MISSING}


def _finished(record: Path, plan: list[Sample]) -> set[Sample]:
    """The videos of an earlier, interrupted call. Raises ``ValueError`` where the folder holds
    others."""
    done: set[Sample] = set()
    planned = {one.path: one for one in plan}
    lines = record.read_text().splitlines() if record.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{record}, line {number}: not JSON") from None
            continue  # the last line of a call that was killed while it wrote
        match = planned.get(row.get("path"))
        if match is None or asdict(match) != _UNSAID | row:
            raise ValueError(
                f"{record}, line {number}: a video of other settings ({row.get('path')}). "
                "Give another --output, or remove that folder"
            )
        if (record.parent / match.path).is_file():
            done.add(match)
    return done


def _generate(
    system: DiffusionSystem, plan: list[Sample], batch_size: int, more: dict[str, Any]
) -> Iterator[tuple[Sample, UInt8[np.ndarray, "F H W 3"]]]:
    for size, group in groupby(sorted(plan, key=lambda one: one.size), key=lambda one: one.size):
        while batch := list(islice(group, batch_size)):
            videos = system.generate(
                [one.prompt for one in batch],
                VideoSize.parse(size),
                [one.seed for one in batch],
                num_steps=batch[0].num_steps,
                guidance_scale=batch[0].guidance_scale,
                sampler=SAMPLERS[batch[0].sampler],
                **more,
            )
            yield from zip(batch, to_frames(videos), strict=True)


@torch.no_grad()
def to_frames(videos: Float[Tensor, "b 3 F H W"]) -> UInt8[np.ndarray, "b F H W 3"]:
    """Pixels from [-1, 1] to 0 ... 255, as a file holds them."""
    return rearrange(as_levels(videos.cpu()), "b c F H W -> b F H W c").numpy()


def read_all(path: Path) -> UInt8[np.ndarray, "F H W 3"]:
    """Every frame of a video file."""
    timeline = read_timeline(path)
    return PyAVReader().read(path, timeline, range(len(timeline)))


def _write_sheet(plan: list[Sample], folder: Path, rows: int) -> None:
    step = max(len(plan) / max(rows, 1), 1.0)
    shown = [plan[int(i * step)] for i in range(min(rows, len(plan)))]
    videos = [read_all(folder / one.path) for one in shown]
    captions, fps = [one.prompt for one in shown], shown[0].fps
    contact_sheet(videos, captions, fps).save(folder / "contact_sheet.png")
    save_animation(moving_sheet(videos, captions), folder / "contact_sheet.gif", fps)


def _row(one: Sample) -> str:
    return json.dumps(asdict(one)) + "\n"


def _file_name(index: int, prompt: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{index:04d}-{slug}.mp4" if slug else f"{index:04d}.mp4"
