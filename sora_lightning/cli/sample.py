"""The command ``sample``: mp4 files from a checkpoint and prompts, or prompts and videos."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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

from sora_lightning.captioner.expansion import PromptExpansion
from sora_lightning.checks import naming, require_at_least, require_seed
from sora_lightning.cli.contact_sheet import contact_sheet, moving_sheet, save_animation
from sora_lightning.cli.errors import filter_warnings
from sora_lightning.cli.expansion import Expansion
from sora_lightning.cli.geometry import check_size
from sora_lightning.cli.sample_tasks import TASKS, Job, TaskInputs, check_inputs
from sora_lightning.conditioning import Conditioner
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.data.manifest import ManifestRow, read_prompts
from sora_lightning.files import file_sha256
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.types import VideoSize, as_levels, height_and_width

_IMAGES = (".png", ".jpg", ".jpeg")
_NUM_WORDS_SHOWN = 8


@dataclass(frozen=True)
class Request:
    """The videos to make: prompts, a task, sizes and seeds.

    Args:
        prompt: What the video shows, in a sentence.
        prompts: A text file (.txt) with a prompt a line, or a manifest (.jsonl, .csv, .parquet,
            .arrow or a folder), whose captions are the prompts and whose clips' proportions choose
            among the sizes.
        prompt_column: The manifest's column of prompts; by default caption, text or prompt.
        task: What to make of a prompt: a video (text), a still image (image), an image that moves
            (animate), what follows or precedes --video (extend, extend-backward), a way from
            --video to another one (connect) or back to its own start (loop), a part of it anew
            (inpaint), it as the prompt says (edit), it changed as the prompt asks (instruct, for a
            training with sources), or a video in windows longer than the training (long).
        size: Height x width in pixels, by default those of the training. Several, for a manifest to
            choose among: 32x32,24x40.
        num_frames: Frames of each video, or of each window; by default as in the training, whose
            frame rate is taken too.
        seed: Seed of the noise: prompt i takes seed + i, in any batch.
    """

    prompt: str | None = None
    prompts: Path | None = None
    prompt_column: str | None = None
    task: str = "text"
    size: str | None = None
    num_frames: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task = {self.task}: must be one of {', '.join(TASKS)}")
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError('give either --prompt "..." or --prompts FILE')
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt = {self.prompt!r}: is empty")
        require_at_least(1, num_frames=self.num_frames)
        self.heights_and_widths()
        require_seed(self.seed)  # the windows of a long video take seeds above

    def heights_and_widths(self) -> list[tuple[int, int]]:
        """Return the requested heights and widths in pixels."""
        texts = [] if self.size is None else self.size.split(",")
        return [height_and_width(text, "size") for text in texts]

    def sizes(self, training: Sequence[VideoSize]) -> list[VideoSize]:
        """Return the video sizes to choose among; the training's where none is requested."""
        num_frames = 1 if TASKS[self.task].still else self.num_frames
        for flag, value in (("--size", self.size), ("--num-frames", num_frames)):
            if value is None and not training:
                raise ValueError(f"{flag} is missing: the checkpoint names no size of its training")
        num_frames = num_frames or training[0].num_frames
        asked = self.heights_and_widths() or [(one.height, one.width) for one in training]
        return [VideoSize(num_frames, *one) for one in dict.fromkeys(asked)]

    def read(self) -> list[ManifestRow]:
        """Read the prompts: a row for each."""
        if self.prompts is None:
            return [ManifestRow("--prompt", {self.prompt_column or "caption": str(self.prompt)})]
        with naming("--prompts"):
            return read_prompts(self.prompts, self.prompt_column)


@dataclass(frozen=True)
class Sample:
    """A video to make and all that decides what it shows: a row of ``prompts.jsonl``.

    ``expanded`` is what the prompt was expanded to, if it was.
    """

    path: str
    prompt: str
    seed: int
    size: str
    fps: float
    task: str
    inputs: TaskInputs
    sampling: SamplingConfig
    checkpoint_sha256: str
    files_sha256: dict[str, str]
    expanded: str | None = None

    @property
    def text(self) -> str:
        """Return the text that the video is sampled from."""
        return self.prompt if self.expanded is None else self.expanded

    def row(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))


def sample(
    checkpoint: Path,
    output: Path,
    request: Request,
    inputs: TaskInputs = TaskInputs(),
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 16,
    sheet_rows: int = 12,
    device: str = "cpu",
    expansion: Expansion = Expansion(),
) -> None:
    """Make videos from sentences, or from sentences and videos, with a trained checkpoint; neither
    the YAML nor the data is needed.

    Args:
        checkpoint: A checkpoint of a text-to-video training, say
            runs/demo/text_to_video/checkpoints/last.ckpt.
        output: With --prompt the mp4 file; with --prompts a folder for the videos, prompts.jsonl
            and contact_sheet.png. What the folder holds already of the same settings is kept.
        request: What to make.
        inputs: What the task starts from.
        sampling: How to sample.
        batch_size: Videos made at a time.
        sheet_rows: Videos in the contact sheet, evenly spread over the prompts.
        device: Where to compute: cpu, cuda, cuda:1.
        expansion: Whether and how prompts are expanded.
    """
    filter_warnings()
    require_at_least(1, batch_size=batch_size, sheet_rows=sheet_rows)
    check_inputs(request.task, inputs, sampling)
    rows = request.read()
    _check_output_name(output, request)
    _check_device(device)
    from sora_lightning.cli.load_for_task import load_for_task  # imports Lightning: seconds

    system = load_for_task(checkpoint, request.task).to(device)
    video_generator = system.video_generator(sampling)
    sizes = request.sizes(system.training_sizes)
    for size in sizes:
        check_size(
            "--size", size, video_generator.tokenizer.compression, video_generator.denoiser.patch
        )
    files = {"weak_model": sampling.guidance.weak_model, **inputs.files}
    hashes = {flag: file_sha256(path) for flag, path in files.items() if path}
    options = request.task, inputs, sampling, file_sha256(checkpoint), hashes
    first = Sample("", "", request.seed, str(sizes[0]), system.fps, *options)
    plan = [_planned(first, i, row, sizes, request) for i, row in enumerate(rows)]
    if request.task != "instruct":  # whose prompts are no descriptions
        plan = _expanded(plan, expansion.load(checkpoint, device))
    _warn_of_unseen_words(system.conditioner, [one.text for one in plan])
    if request.prompts is None:
        if plan[0].expanded is not None:
            print(f"{plan[0].prompt} -> {plan[0].text}")
        _prepare(output, folder=output.parent)
        for one, video in make_videos(video_generator, plan, batch_size):
            _write(output, video, one.fps)
        print(output)
    else:
        _prepare(output, folder=output)
        _sample_folder(video_generator, plan, output, batch_size)
        _write_sheet(plan, output, sheet_rows)
        print(f"{len(plan)} videos, prompts.jsonl and contact_sheet.png in {output}")


@torch.no_grad()
def make_videos(
    video_generator: VideoGenerator, plan: list[Sample], batch_size: int
) -> Iterator[tuple[Sample, UInt8[np.ndarray, "F H W 3"]]]:
    """Make the planned videos in batches of one size and yield each with its row."""
    for size, group in groupby(sorted(plan, key=lambda one: one.size), key=lambda one: one.size):
        while batch := list(islice(group, batch_size)):
            first = batch[0]
            job = Job(
                video_generator,
                [one.text for one in batch],
                [one.seed for one in batch],
                VideoSize.parse(size),
                first.fps,
                first.inputs,
            )
            yield from zip(batch, to_frames(TASKS[first.task].run(job)), strict=True)


def to_frames(videos: Float[Tensor, "b 3 F H W"]) -> UInt8[np.ndarray, "b F H W 3"]:
    """Convert pixels from [-1, 1] to 0 ... 255, as files hold them."""
    return rearrange(as_levels(videos.detach().cpu()), "b c F H W -> b F H W c").numpy()


def _warn_of_unseen_words(conditioner: Conditioner, prompts: list[str]) -> None:
    """Warn of words whose meaning the text encoder cannot know."""
    unseen = conditioner.unseen_words(prompts)
    if unseen:
        words = ", ".join(map(repr, unseen[:_NUM_WORDS_SHOWN]))
        more = f" and {len(unseen) - _NUM_WORDS_SHOWN} more" if unseen[_NUM_WORDS_SHOWN:] else ""
        warnings.warn(
            f"the text encoder never saw these words of the prompts in training: {words}{more}",
            stacklevel=3,
        )


def _expanded(plan: list[Sample], expansion: PromptExpansion | None) -> list[Sample]:
    """Return the videos with expanded prompts; as they are without a model that expands."""
    if expansion is None:
        return plan
    texts = expansion.expand([one.prompt for one in plan])
    hashes = {**plan[0].files_sha256, "expand": expansion.fingerprint()}
    pairs = zip(plan, texts, strict=True)
    return [replace(one, expanded=text, files_sha256=hashes) for one, text in pairs]


def _planned(
    first: Sample, index: int, row: ManifestRow, sizes: list[VideoSize], request: Request
) -> Sample:
    """Return the video of the prompt at ``index``, with the settings of the first one."""
    prompt = row.first_caption(request.prompt_column).strip()
    return replace(
        first,
        path=_file_name(index, prompt, ".png" if TASKS[first.task].still else ".mp4"),
        prompt=prompt,
        seed=first.seed + index,
        size=str(_nearest_size(row, sizes)),
    )


def _nearest_size(row: ManifestRow, sizes: list[VideoSize]) -> VideoSize:
    """Return the size with the aspect ratio nearest to the row's clip; the first if unknown."""
    height, width = row.count("height"), row.count("width")
    if not (height and width):
        return sizes[0]
    ratio = math.log(height / width)
    return min(sizes, key=lambda size: abs(math.log(size.height / size.width) - ratio))


def _check_output_name(output: Path, request: Request) -> None:
    if request.prompts is not None:
        if output.is_file():
            raise ValueError(f"--output {output}: is a file; with --prompts it must be a folder")
        return
    still = TASKS[request.task].still
    suffixes, what = (_IMAGES, "image") if still else ((".mp4",), "video")
    if output.suffix not in suffixes:
        raise ValueError(
            f"--output {output}: a single {what} is written to a file that ends in {suffixes[0]}"
        )
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; a single {what} is written to a file")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device}: cannot be used here: {reason}") from error


def _prepare(output: Path, folder: Path) -> None:
    """Make the folder of an output. Raises ``ValueError`` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "prompts.jsonl" if output == folder else output
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise ValueError(f"--output {output}: cannot be written ({reason})") from error


def _write(output: Path, frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> None:
    if output.suffix in _IMAGES:
        Image.fromarray(frames[0]).save(output)
    else:
        write_video(output, frames, fps)


def _sample_folder(
    video_generator: VideoGenerator, plan: list[Sample], folder: Path, batch_size: int
) -> None:
    """Write the videos that are missing. Each is recorded in ``prompts.jsonl`` as soon as its file
    is complete.
    """
    record = folder / "prompts.jsonl"
    done = _finished(record, plan)
    record.write_text("".join(_line(one) for one in plan if one.path in done))
    left = [one for one in plan if one.path not in done]
    with (
        tqdm(total=len(plan), initial=len(done), desc="videos", unit="video") as bar,
        record.open("a") as rows,
    ):
        for one, video in make_videos(video_generator, left, batch_size):
            _write(folder / one.path, video, one.fps)
            rows.write(_line(one))
            rows.flush()
            bar.update()
    record.write_text("".join(map(_line, plan)))


def _finished(record: Path, plan: list[Sample]) -> set[str]:
    """Return the paths of an interrupted call's videos. Raises ``ValueError`` where the folder
    holds others.
    """
    done: set[str] = set()
    planned = {one.path: one for one in plan}
    text = record.read_text(encoding="utf-8", errors="replace") if record.is_file() else ""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{record}, line {number}: not JSON") from None
            continue  # the last line of a call that was killed while it wrote
        path = str(row.get("path")) if isinstance(row, dict) else ""
        match = planned.get(path)
        if match is None or match.row() != _completed(match, row):
            raise ValueError(
                f"{record}, line {number}: a video of other settings ({path}). "
                "Give another --output, or remove that folder"
            )
        if (record.parent / match.path).is_file():
            done.add(match.path)
    return done


def _completed(match: Sample, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with defaults for options that did not exist when it was written."""
    defaults = replace(match, task="text", inputs=TaskInputs(), sampling=SamplingConfig()).row()
    defaults["expanded"] = None
    named = ("task", "inputs", "sampling", "expanded")
    return _merged({key: defaults[key] for key in named}, row)


def _merged(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value)
        for key, value in delta.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | delta | both


def _write_sheet(plan: list[Sample], folder: Path, rows: int) -> None:
    step = max(len(plan) / rows, 1.0)
    shown = [plan[int(i * step)] for i in range(min(rows, len(plan)))]
    videos = [read_frames(folder / one.path)[0] for one in shown]
    captions, fps = [one.prompt for one in shown], shown[0].fps
    contact_sheet(videos, captions, fps).save(folder / "contact_sheet.png")
    save_animation(moving_sheet(videos, captions), folder / "contact_sheet.gif", fps)


def _line(one: Sample) -> str:
    return json.dumps(one.row()) + "\n"


def _file_name(index: int, prompt: str, suffix: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{index:04d}-{slug}{suffix}" if slug else f"{index:04d}{suffix}"
