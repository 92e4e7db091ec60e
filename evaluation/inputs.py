"""Lists of videos and prompts to evaluate, and clips of them as uint8 frames.

Frames are selected by time, not by count, so that files of any frame rate are evaluated at the
protocol's frame rate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.files import CONTAINERS, TENSORS, VideoFile, is_video
from evaluation.fingerprint import texts_sha256
from evaluation.protocol import ClipSpec
from sora_lightning.data.manifest import ManifestRow, read_table
from sora_lightning.data.manifest.records import CAPTION_COLUMNS
from sora_lightning.data.manifest.roots import HOLDERS
from sora_lightning.data.manifest.tables import file_identity

PROMPTS_FILE = "prompts.jsonl"
SAMPLING_KEYS = ("seed", "num_steps", "guidance_scale", "checkpoint_sha256")

Video = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class VideoEntry:
    """A video to evaluate: its file, its prompt in one or more wordings, and how it was sampled.

    ``sampling`` holds the row's values for ``SAMPLING_KEYS``, and the options of the row's
    ``sampling`` by name. The ``scale`` of its ``guidance`` is named ``guidance_scale``, and
    ``expanded_by`` is the fingerprint of the model that expanded its prompt.
    """

    file: VideoFile
    wordings: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def prompt(self) -> str:
        """The first wording, which is the one evaluated; "" if there is none."""
        return self.wordings[0] if self.wordings else ""


def read_listing(
    path: Path, prompts: bool = True, root: str | None = None, prompt_column: str | None = None
) -> list[VideoEntry]:
    """Return the videos of a folder or manifest. With ``prompts``, each video needs a prompt."""
    read = read_folder if path.is_dir() else read_entries
    return read(path, prompts, root, prompt_column)


def read_entries(
    listing: Path, prompts: bool = True, root: str | None = None, prompt_column: str | None = None
) -> list[VideoEntry]:
    """Return the rows of a manifest, read by ``sora_lightning.data.manifest``.

    ``prompt_column`` holds the prompts; by default the first of ``CAPTION_COLUMNS`` that a row has.

    A folder of frames and a tensor need ``fps`` in their row, and a tensor also ``layout`` and
    ``range``, as in ``VideoFile``. The videos lie in the manifest's folder, or under ``root``.
    Raises ``ValueError`` naming the file, the line and the key for an invalid row, a video that
    does not exist, and a clip that is listed twice.
    """
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file")
    entries, places = [], dict[tuple[object, ...], str]()
    for row in read_table(listing, root):
        entry = _entry(row, listing.parent, prompts, prompt_column)
        file = entry.file
        clip = (file_identity(file.path), file.start_s, file.end_s)
        if clip in places:
            raise row.error("path", f"the same clip stands in {places[clip]}")
        places[clip] = row.place
        entries.append(entry)
    return entries


def _entry(row: ManifestRow, folder: Path, prompts: bool, prompt_column: str | None) -> VideoEntry:
    for holder in HOLDERS:
        if holder in row.columns:
            raise row.error(holder, "only videos that are files of their own can be evaluated")
    path = folder / row.path()
    if not path.exists():
        raise row.error("path", f"{path} does not exist")
    wordings: tuple[str, ...] = ()
    if prompt_column is not None:
        wordings = row.wordings(prompt_column)[0]
    elif prompts or any(key in row.columns for key in CAPTION_COLUMNS):
        wordings = row.captions()[0]
    fps = row.number("fps", at_least=1e-3) if path.suffix.lower() not in CONTAINERS else None
    columns = row.columns
    file = VideoFile(path, fps, columns.get("layout"), columns.get("range"), *row.window())
    sampling = dict(_options(columns.get("sampling")))
    sampling |= {key: columns[key] for key in SAMPLING_KEYS if key in columns}
    if columns.get("expanded") is not None:
        sampling["expanded_by"] = (columns.get("files_sha256") or {}).get("expand", "unknown")
    return VideoEntry(file, tuple(text.strip() for text in wordings), sampling)


def _options(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Return the options of a nested record by the names of their groups, without unset ones."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _options(inner, f"{name}_{key}" if name else key)
    elif isinstance(value, list):
        yield name, ",".join(map(str, value))
    elif value is not None and name:
        yield name, value


def read_folder(
    folder: Path, prompts: bool = True, root: str | None = None, prompt_column: str | None = None
) -> list[VideoEntry]:
    """Return the videos of a folder, with the prompts of its ``prompts.jsonl``.

    If there is no such file and no prompts are needed, all videos are returned, sorted by name.
    Raises ``ValueError`` for a folder that does not exist, holds no video, or lacks prompts that
    are needed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    videos = sorted(path for path in folder.iterdir() if is_video(path))
    if not videos:
        known = ", ".join(CONTAINERS + TENSORS)
        raise ValueError(f"{folder}: holds no video; known are {known} and folders of frames")
    if (folder / PROMPTS_FILE).is_file():
        return read_entries(folder / PROMPTS_FILE, prompts, root, prompt_column)
    if prompts:
        raise ValueError(
            f"{folder}: holds {len(videos)} videos and no {PROMPTS_FILE}; "
            'write a row {"path": ..., "prompt": ...} for each'
        )
    return [VideoEntry(VideoFile(path)) for path in videos]


def read_video(
    file: VideoFile,
    num_frames: int,
    fps: float | None,
    window: str = "middle",
    fraction: float = 0.5,
) -> Video:
    """Read ``num_frames`` frames at ``fps`` from a window of a video.

    Each frame is the one displayed at its time. Without ``fps``, the frames are successive frames
    of the file. The window is at the ``start``, in the ``middle``, or, if ``random``, at the
    ``fraction`` in 0..1 between start and end. Raises ``ValueError`` naming the file if it cannot
    be decoded or is too short.
    """
    times, end = file.times()
    check_length(file, times, end, num_frames, fps)
    part = {"start": 0.0, "middle": 0.5, "random": fraction}[window]
    if fps is None:
        first = int(part * (len(times) - num_frames) + (0.5 if window == "random" else 0))
        return file.frames(np.arange(first, first + num_frames))
    start = times[0] + max(0.0, end - times[0] - num_frames / fps) * part
    wanted = start + np.arange(num_frames) / fps
    # Times are rounded to the file's time base: a frame may begin half a millisecond late.
    return file.frames(np.searchsorted(times, wanted + 5e-4, side="right") - 1)


def check_length(
    file: VideoFile, times: Float[np.ndarray, " F"], end: float, num_frames: int, fps: float | None
) -> None:
    """Raise ``ValueError`` naming the file if it is too short for a window or has no frame rate."""
    if fps is None:
        if len(times) < num_frames:
            raise ValueError(f"{file.path}: has {len(times)} frames; {num_frames} are needed")
        return
    if not file.has_clock:
        raise ValueError(f"{file.path}: has no frame rate; its row must say 'fps'")
    length = end - times[0]
    # A window lasts num_frames / fps, but its last frame only has to begin within the file.
    if (num_frames - 1) / fps >= length - 1e-6:
        raise ValueError(
            f"{file.path}: lasts {length:.2f} s; {num_frames} frames at {fps:g} fps "
            f"take {num_frames / fps:.2f} s"
        )


def long_enough(entry: VideoEntry, clips: ClipSpec) -> bool:
    """Return True if a video is as long as a clip."""
    times, end = entry.file.times()
    try:
        check_length(entry.file, times, end, clips.num_frames, clips.fps)
    except ValueError:
        return False
    return True


def nearest_size(
    height_and_width: tuple[int, ...], sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the (height, width) of the nearest aspect ratio; the first one of equals."""
    height, width = height_and_width
    ratio = np.log(height / width)
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - ratio))


def cover(video: Video, height: int, width: int) -> UInt8[np.ndarray, "F height width 3"]:
    """Center-crop a video to the aspect ratio height / width, and resize it (bilinear,
    antialiased).

    The aspect ratio is exact to half a pixel of the source.
    """
    rows = min(video.shape[1], max(1, round(video.shape[2] * height / width)))
    columns = min(video.shape[2], max(1, round(video.shape[1] * width / height)))
    top, left = (video.shape[1] - rows) // 2, (video.shape[2] - columns) // 2
    cut = video[:, top : top + rows, left : left + columns]
    return cut if cut.shape[1:3] == (height, width) else _resized(cut, [height, width])


def squash(video: Video, side: int) -> UInt8[np.ndarray, "F side side 3"]:
    """Resize a video to a square, ignoring the aspect ratio (bilinear, antialiased)."""
    return _resized(video, [side, side])


def _resized(video: Video, size: list[int]) -> UInt8[np.ndarray, "F height width 3"]:
    frames = rearrange(torch.from_numpy(video), "F H W c -> F c H W").float()
    frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    return rearrange(frames.round().clamp(0, 255).byte(), "F c H W -> F H W c").numpy()


def as_batch(videos: Sequence[Video]) -> UInt8[Tensor, "b 3 F H W"]:
    """Stack clips of one size to a batch for feature extractors."""
    return rearrange(torch.from_numpy(np.stack(videos)), "b F H W c -> b c F H W")


BATCH = 16
DECODED_AHEAD = 4
# Maximal number of clips that wait for others of their size, in batches.
_WAITING = 4

Look = Callable[[UInt8[Tensor, "b 3 F H W"], list[int]], Mapping[str, Sequence[Any]]]


class Videos(Protocol):
    """A sequence of videos, which may be decoded on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Video: ...


class CutClips:
    """A clip of each entry, at the size of the protocol with the nearest aspect ratio.

    Clips are decoded on each access. ``window`` is one of ``WINDOWS``; the position of a random
    window depends on ``seed`` and the index of the entry.
    """

    def __init__(
        self, entries: Sequence[VideoEntry], clips: ClipSpec, window: str, seed: int
    ) -> None:
        self.entries, self.clips, self.window, self.seed = entries, clips, window, seed

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int) -> Video:
        fraction = 0.5
        if self.window == "random":
            fraction = float(np.random.default_rng([self.seed, place]).random())
        clips, file = self.clips, self.entries[place].file
        video = read_video(file, clips.num_frames, clips.fps, self.window, fraction)
        return cover(video, *nearest_size(video.shape[1:3], clips.heights_and_widths))


@torch.no_grad()
def look_through(videos: Videos, look: Look, description: str) -> dict[str, list[Any]]:
    """Apply ``look`` to batches of videos, and return its results by name, in the videos' order.

    ``look`` takes a batch of one size and the indices of its videos, and returns one row per video
    under each name.
    """
    rows: dict[str, dict[int, Any]] = {}
    with tqdm(total=len(videos), desc=description, unit="video") as bar:
        for places, batch in _batches(videos):
            for name, values in look(batch, places).items():
                rows.setdefault(name, {}).update(zip(places, values, strict=True))
            bar.update(len(places))
    return {name: [found[i] for i in range(len(videos))] for name, found in rows.items()}


def decoded(videos: Videos) -> Iterator[Video]:
    """Yield the videos in order. Threads decode the next few."""
    waiting: deque[Future[Video]] = deque()
    with ThreadPoolExecutor(DECODED_AHEAD) as pool:
        for place in range(len(videos)):
            waiting.append(pool.submit(videos.__getitem__, place))
            if len(waiting) > DECODED_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(videos: Videos) -> Iterator[tuple[list[int], UInt8[Tensor, "b 3 F H W"]]]:
    waiting: dict[tuple[int, ...], dict[int, Video]] = {}
    for place, video in enumerate(decoded(videos)):
        waiting.setdefault(video.shape, {})[place] = video
        fullest = max(waiting.values(), key=len)
        if len(fullest) == BATCH or sum(map(len, waiting.values())) == _WAITING * BATCH:
            places, batch = list(fullest), as_batch(list(fullest.values()))
            fullest.clear()
            yield places, batch
    for left in waiting.values():
        if left:
            yield list(left), as_batch(list(left.values()))


def dataset_sha256(entries: Sequence[VideoEntry]) -> str:
    """Return the sha256 of the videos' contents and prompts in their order, not of their paths."""
    return texts_sha256([entry.file.sha256() + entry.prompt for entry in entries])
