"""The Fréchet distance of 2 x 256 clips, on given features, from pixels and from files, beside
torchmetrics, which decord's frames are given to.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.inputs import CutClips, as_batch, decoded, read_folder
from evaluation.metrics import FrechetVideoDistance
from evaluation.protocol import ClipSpec
from sora_lightning.data import write_dataset

if TYPE_CHECKING:
    from tests.bench.report import Report

CLIPS, BATCH, WIDTH = 256, 32, 400
FILES, FRAMES, SIDE = 64, 17, 32  # of each set; as the clips are that are rendered


class Given(nn.Module):
    """Features that are there already, in the form of videos of one row of pixels."""

    num_features = WIDTH

    def forward(self, rows: Tensor) -> Float[Tensor, "b d"]:
        return rows[:, 0, 0, 0].float()


class Pixels(nn.Module):
    """A small convolution to as many features as I3D has."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, WIDTH, 4, stride=4)

    def forward(self, videos: Tensor) -> Float[Tensor, "b d"]:
        return reduce(self.convolution(videos.float() / 127.5 - 1), "b d f h w -> b d", "mean")


def run(report: Report) -> None:
    given(report)
    torch.manual_seed(0)
    videos = torch.randint(0, 256, (2 * CLIPS, 3, 8, 32, 32), dtype=torch.uint8)
    _compare(report, "from pixels", Pixels(), videos)
    from_files(report)


def given(report: Report) -> None:
    """Compare the distance alone, on features that are there."""
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (2 * CLIPS, 1, 1, 1, WIDTH), dtype=torch.uint8)
    _compare(report, "given features", Given(), rows)


def _compare(report: Report, case: str, network: nn.Module, clips: Tensor) -> None:
    batches = clips.split(BATCH)
    candidates = {
        "torchmetrics": lambda: theirs(network, batches),
        "evaluation": lambda: ours(network, batches),
    }
    report.compare(f"FVD of 2 x {CLIPS} clips, {case}", candidates, items=2 * CLIPS, unit="clips")


def from_files(report: Report) -> None:
    """Compare what two folders of videos take to be scored."""
    if not importlib.util.find_spec("decord"):
        print("  no decord, which reads files for torchmetrics")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), num_train=2 * FILES, num_val=0, num_test=0)
        paths = sorted(Path(folder).rglob("*.mp4"))
        network = Pixels()
        candidates = {
            "torchmetrics": lambda: theirs(network, _by_decord(paths)),
            "evaluation": lambda: ours(network, _by_evaluation(paths[0].parent)),
        }
        case = f"FVD of 2 x {FILES} clips, from files"
        report.compare(case, candidates, items=2 * FILES, unit="clips")


def _by_evaluation(folder: Path) -> Iterator[Tensor]:
    entries = read_folder(folder, prompts=False)
    clips = CutClips(entries, ClipSpec(FRAMES, None, (f"{SIDE}x{SIDE}",)), "start", 0)
    videos = decoded(clips)
    while batch := list(islice(videos, BATCH)):
        yield as_batch(batch)


def _by_decord(paths: Sequence[Path]) -> Iterator[Tensor]:
    from decord import VideoReader

    for start in range(0, len(paths), BATCH):
        frames = [
            VideoReader(str(path), width=SIDE, height=SIDE).get_batch(range(FRAMES)).asnumpy()
            for path in paths[start : start + BATCH]
        ]
        yield rearrange([torch.from_numpy(f) for f in frames], "b F H W c -> b c F H W")


def ours(network: nn.Module, batches: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    metric = FrechetVideoDistance(network, WIDTH)
    seen = 0
    for clips, real in _halves(batches):
        metric.update(clips, range(seen, seen + len(clips)), real=real)
        seen += len(clips)
    return metric.compute()


def theirs(network: nn.Module, batches: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    metric = FrechetInceptionDistance(feature=network)
    for clips, real in _halves(batches):
        metric.update(clips, real=real)
    return metric.compute()


def _halves(batches: Iterator[Tensor] | Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield every other batch as real."""
    for i, clips in enumerate(batches):
        yield clips, i % 2 == 0
