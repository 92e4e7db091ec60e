"""Data: clips decoded into batches by each reader, a million clips planned, and the share of a
training step that waits for data.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sora_lightning.data import (
    BatchPlan,
    GuardedReader,
    Packing,
    PackPlan,
    PyAVReader,
    Reader,
    TorchCodecReader,
    VideoDataModule,
    write_dataset,
    write_video,
)
from sora_lightning.data.decode import default_reader, read_timeline
from sora_lightning.data.packing import plan_pass
from sora_lightning.denoisers import DiT
from sora_lightning.types import Condition, VideoSize
from tests.bench.report import Report
from tests.data.mixture import LARGEST_AREA, TOKENS, mixture

NUM_CLIPS = 1_000_000
SIZES = ["17x32x32", "17x24x40", "17x40x24"]
BATCH_PIXELS = 32 * 17 * 32 * 32


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), num_train=128, num_val=0, num_test=0)["train"]
        _decode(report, manifest)
        _guard(report, Path(folder) / "guard.mp4")
        _wait(report, manifest)
    _plan(report)


def _readers() -> dict[str, Reader]:
    readers: dict[str, Reader] = {"PyAV": PyAVReader()}
    if importlib.util.find_spec("decord"):
        readers = {"decord": default_reader(), **readers}
    try:
        readers["torchcodec"] = TorchCodecReader()
    except ValueError as error:
        print(f"  no torchcodec: {error}")
    return readers


def _decode(report: Report, manifest: Path) -> None:
    """Every reader serves the same batches of the same files; a call is one batch."""
    candidates = {}
    for name, reader in _readers().items():
        data = VideoDataModule(
            manifest, SIZES[:1], 8.0, BATCH_PIXELS, reader=reader, steps_per_epoch=10**9
        )
        data.setup("fit")
        candidates[name] = iter(data.train_dataloader()).__next__
    report.compare("a batch of 32 clips, 17x32x32", candidates, items=32, unit="clips")


def _guard(report: Report, path: Path) -> None:
    """Sixteen frames of 480 x 320 by each reader, in this process and in a guarded child."""
    coarse = np.random.default_rng(0).integers(0, 255, (60, 20, 30, 3)).astype(np.uint8)
    write_video(path, coarse.repeat(16, 1).repeat(16, 2), fps=24, keyframe_every=30)
    timeline = read_timeline(path)
    starts = itertools.cycle(np.random.default_rng(1).integers(0, 40, 30).tolist())
    for name, reader in _readers().items():
        guarded = GuardedReader(reader, 20.0)

        def read(one: Reader) -> None:
            start = next(starts)
            one.read(path, timeline, list(range(start, start + 16)))

        candidates = {"bare": partial(read, reader), "guarded": partial(read, guarded)}
        rows = report.compare(f"a clip of 16 frames by {name}", candidates, items=1, unit="clips")
        cost = rows["guarded"].median_s / rows["bare"].median_s
        print(f"  the guard costs {cost:.2f} times the time")
        guarded.guard.close()


def _plan(report: Report) -> None:
    """One pass over a million clips, planned whole; training waits for neither."""
    plan = PackPlan(mixture(NUM_CLIPS, 0), Packing(TOKENS, "4x8x8", 121, LARGEST_AREA), 0)
    counts = {VideoSize(17, 32 * i, 32): NUM_CLIPS // 8 for i in range(1, 9)}
    passes = itertools.count()

    def buckets() -> object:
        whole = BatchPlan(counts, dict.fromkeys(counts, 64), next(passes), 8)
        return [whole.batch(i) for i in range(0, whole.batches_per_pass, 64)]

    candidates = {"packing": lambda: plan_pass(plan, next(passes)), "buckets": buckets}
    report.compare("a pass over a million clips", candidates, items=NUM_CLIPS, unit="clips")


def _wait(report: Report, manifest: Path) -> None:
    """A step of a small denoiser on a batch, with the batch from the loader and with one that is
    there already: what lies between the two is waiting. Two workers decode.
    """
    data = VideoDataModule(
        manifest, SIZES[:1], 8.0, BATCH_PIXELS, num_workers=2, steps_per_epoch=10**9
    )
    data.setup("fit")
    batches = iter(data.train_dataloader())
    model = DiT(8, 32, width=256, depth=8, num_heads=4, patch=(1, 1, 1))
    x, t = torch.randn(32, 8, 5, 4, 4), torch.rand(32)
    condition = Condition(
        torch.randn(32, 8, 32), torch.ones(32, 8, dtype=torch.bool), torch.randn(32, 32)
    )

    def step() -> None:
        model(x, t, condition).square().mean().backward()

    waited: list[float] = []

    def fed() -> None:
        begun = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - begun)
        step()

    rows = report.compare("a training step of 32 clips", {"with loader": fed, "alone": step})
    share = sorted(waited)[len(waited) // 2] / rows["with loader"].median_s
    print(f"  {share:.1%} of the step with loader waits for data")
