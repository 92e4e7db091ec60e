"""Data: clips decoded into batches by each reader, and a million clips planned."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sora_lightning.data import (
    BatchPlan,
    ClipRecord,
    Packing,
    PackPlan,
    PyAVReader,
    Reader,
    SubprocessReader,
    TorchCodecReader,
    write_dataset,
    write_video,
)
from sora_lightning.data.batching.packing import plan_epoch
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.readers import default_reader
from sora_lightning.data.decoding.timeline import read_timeline
from sora_lightning.files import file_sha256
from sora_lightning.types import VideoSize
from tests.bench.report import Report
from tests.data.batching.mixture import LARGEST_AREA, TOKENS, mixture
from tests.data.modules import data_module

NUM_CLIPS = 1_000_000
SIZES = ["17x32x32", "17x24x40", "17x40x24"]
BATCH_PIXELS = 32 * 17 * 32 * 32
HASHED_MB = 32


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), num_train=128, num_val=0, num_test=0)["train"]
        _decode(report, manifest)
        _time_subprocess(report, Path(folder) / "steady.mp4")
        _verify(report, Path(folder) / "clip.bin")
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
        data = data_module(
            manifest, SIZES[:1], 8.0, BATCH_PIXELS, reader=reader, steps_per_epoch=10**9
        )
        data.setup("fit")
        candidates[name] = iter(data.train_dataloader()).__next__
    report.compare("a batch of 32 clips, 17x32x32", candidates, items=32, unit="clips")


def _time_subprocess(report: Report, path: Path) -> None:
    """Sixteen frames of 480 x 320 by each reader, in this process and in a child."""
    coarse = np.random.default_rng(0).integers(0, 255, (60, 20, 30, 3)).astype(np.uint8)
    write_video(path, coarse.repeat(16, 1).repeat(16, 2), fps=24, keyframe_every=30)
    timeline = read_timeline(path)
    # How far back the key frame lies decides the cost of a call: here it is the same for all.
    starts = [7, 37]
    for name, reader in _readers().items():
        child = SubprocessReader(reader, 20.0)

        def read(one: Reader, coming: Iterator[int]) -> None:
            start = next(coming)
            one.read(path, timeline, list(range(start, start + 16)))

        readers = {"bare": reader, "child": child}
        candidates = {n: partial(read, one, itertools.cycle(starts)) for n, one in readers.items()}
        rows = report.compare(f"a clip of 16 frames by {name}", candidates, items=1, unit="clips")
        median = rows["child"].median_s / rows["bare"].median_s
        fastest = rows["child"].fastest_s / rows["bare"].fastest_s
        print(
            f"  a subprocess costs {median:.2f} times the time, {fastest:.2f} of the fastest calls"
        )
        child.caller.close()


def _verify(report: Report, path: Path) -> None:
    """Measure what ``verify_content`` adds to the first serving of a file, and to later ones."""
    path.write_bytes(np.random.default_rng(2).bytes(HASHED_MB * 10**6))
    state = path.stat()
    columns = {
        "content": file_sha256(path),
        "num_bytes": state.st_size,
        "modified_ns": state.st_mtime_ns,
    }
    record = ClipRecord(path, ("a clip",), "0", columns=columns)
    seen = Checksums(verify=True)
    candidates = {
        "first": lambda: Checksums(verify=True).require_unchanged(record, path),
        "later": lambda: seen.require_unchanged(record, path),
    }
    case = f"{HASHED_MB} MB compared with what was indexed"
    rows = report.compare(case, candidates, items=HASHED_MB, unit="MB")
    print(f"  {1e3 * rows['first'].median_s / HASHED_MB:.2f} ms for each MB")


def _plan(report: Report) -> None:
    """One pass over a million clips, planned whole; training waits for neither."""
    plan = PackPlan(mixture(NUM_CLIPS, 0), Packing(TOKENS, "4x8x8", 121, LARGEST_AREA), 0)
    counts = {VideoSize(17, 32 * i, 32): NUM_CLIPS // 8 for i in range(1, 9)}
    passes = itertools.count()

    def buckets() -> object:
        whole = BatchPlan(counts, dict.fromkeys(counts, 64), next(passes), 8)
        return [whole.batch(i) for i in range(0, whole.batches_per_epoch, 64)]

    candidates = {"packing": lambda: plan_epoch(plan, next(passes)), "buckets": buckets}
    report.compare("a pass over a million clips", candidates, items=NUM_CLIPS, unit="clips")
