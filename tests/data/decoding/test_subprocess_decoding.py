"""A file that hangs or crashes a decoder, or is damaged, costs one clip: never the run, never a
wrong frame."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from sora_lightning.data import DecodeError, PyAVReader
from sora_lightning.data.decoding.bad_clips import BadClips, TooManyBadClips
from sora_lightning.data.decoding.readers import Reader, default_reader
from sora_lightning.data.decoding.subprocess_decoding import (
    SubprocessCaller,
    SubprocessReader,
    subprocess_map,
)
from sora_lightning.data.decoding.timeline import Timeline, read_timeline
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoBatch
from tests.data.barcodes import cut_without_encoding, numbers_in
from tests.data.modules import data_module

STEADY = list(range(0, 60 * 40, 40))
CLOSED = {"g": "12", "bf": "2", "x264-params": "open-gop=0:scenecut=0"}


class Unruly(Reader):
    """PyAV's frames; hangs on files called hang*, and dies on files called crash*."""

    def read(self, path: Path, timeline: Timeline, indices: Sequence[int]) -> np.ndarray:
        if path.name.startswith("hang"):
            while True:
                pass
        if path.name.startswith("crash"):
            os.abort()
        return PyAVReader().read(path, timeline, indices)


def test_a_hang_and_a_crash_end_with_their_call(barcodes: Callable[..., Path]) -> None:
    paths = {name: barcodes(f"{name}.mp4", STEADY) for name in ("good", "hang", "crash")}
    reader = SubprocessReader(Unruly(), timeout_s=1.0)
    timelines = {name: reader.timeline(path) for name, path in paths.items()}
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(DecodeError, match=r"hang.mp4: took longer than 1 s"):
            reader.read(paths["hang"], timelines["hang"], [3])
        assert 0.9 < time.monotonic() - started < 2.0
        with pytest.raises(DecodeError, match=r"crash.mp4: crashed the decoder \(SIGABRT\)"):
            reader.read(paths["crash"], timelines["crash"], [3])
        frames = reader.read(paths["good"], timelines["good"], [3, 50])
        assert numbers_in(frames) == [3, 50]


def _signalled(number: int) -> int:
    os.kill(os.getpid(), number)
    return number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_does_not_blame_the_clip(number: int) -> None:
    assert SubprocessCaller(timeout_s=10.0)(_signalled, number) == (number, "")


def test_a_call_in_a_child_gives_what_the_function_gives() -> None:
    caller = SubprocessCaller(5.0)
    assert caller(max, 3, 4) == (4, "")
    for num_bytes in (0, 10, 2**20, 40 * 2**20, 40 * 2**20):  # the last but one outgrows the buffer
        array, _ = caller(np.arange, num_bytes, None, 1, np.uint8)
        np.testing.assert_array_equal(array, np.arange(num_bytes).astype(np.uint8))
    with pytest.raises(ZeroDivisionError):
        caller(divmod, 1, 0)
    assert caller(os.write, 2, b"damaged") == (7, "damaged")
    assert caller(max, 1, 2) == (2, "")
    first = caller(os.getpid)[0]
    assert caller(os.getpid)[0] == first != os.getpid()
    caller.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pytest.raises(ValueError, match="timeout_s = 0"):
        SubprocessCaller(0.0)


def test_arrays_are_lent_without_a_copy_and_not_written_over_while_in_use() -> None:
    caller = SubprocessCaller(5.0)

    def filled(value: int) -> np.ndarray:
        return caller(np.full, (1000, 8), value, np.uint8)[0]

    first = filled(1)
    assert caller._child is not None
    shared = np.frombuffer(caller._child.shared[0], np.uint8)
    assert np.shares_memory(first, shared)
    part = torch.from_numpy(first)[10:]
    del first
    others = [filled(value) for value in (2, 3, 4)]
    assert [int(other.min()) for other in others] == [2, 3, 4]
    assert part.unique().tolist() == [1]
    assert not any(np.shares_memory(other, shared) for other in others)
    del part
    last = filled(5)
    assert np.shares_memory(last, shared)
    caller.close()
    assert last.min() == 5


def test_a_subprocess_map_keeps_the_order_and_the_errors(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(30)]
    results = list(subprocess_map(read_timeline, paths, 3, 5.0))
    assert [path.name in str(error) for path, error in zip(paths, results, strict=True)] == [
        True
    ] * 30
    assert list(subprocess_map(abs, range(-50, 0), 3, 5.0)) == list(range(50, 0, -1))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def opened(path: Path, times: int) -> Iterator[int]:
    """The memory of the process after each tenth of the reads."""
    for part in range(10):
        for number in range(times // 10):
            default_reader().read(path, read_timeline(path), [number % 60])
        del part
        yield resident_bytes()


@pytest.mark.slow
def test_memory_stays_flat(barcodes: Callable[..., Path]) -> None:
    path, times = barcodes("closed.mp4", STEADY, options=CLOSED), 10_000
    caller = SubprocessCaller(600.0)
    memory, _ = caller(_memory, path, times)
    assert memory[-1] - memory[1] < 16 * 2**20
    before = resident_bytes()
    reader = SubprocessReader(default_reader(), 20.0)
    for number in range(times):
        reader.read(path, reader.timeline(path), [number % 60])
    assert resident_bytes() - before < 16 * 2**20


def _memory(path: Path, times: int) -> list[int]:
    return list(opened(path, times))


@pytest.mark.slow
def test_decoding_in_a_child_costs_little(tmp_path: Path) -> None:
    """Sixteen frames of 480 x 320, by PyAV with and without; the orders alternate."""
    from sora_lightning.data import write_video

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (60, 20, 30, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", coarse.repeat(16, 1).repeat(16, 2), fps=24, keyframe_every=30)
    timeline = read_timeline(tmp_path / "a.mp4")
    readers = {"bare": default_reader(), "child": SubprocessReader(default_reader(), 20.0)}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for start in rng.integers(0, 40, 30).tolist():
        for name, reader in readers.items():
            started = time.perf_counter()
            reader.read(tmp_path / "a.mp4", timeline, list(range(start, start + 16)))
            seconds[name].append(time.perf_counter() - started)
    assert np.median(seconds["child"]) <= 1.2 * np.median(seconds["bare"])


class Nothing(L.LightningModule):
    """Counts the clips that it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed: list[str] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        self.fed += batch.clip_ids
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fed(
    folder: Path, names: Sequence[str], source: Path, also: Sequence[Path] = (), **settings: object
) -> list[str]:
    """The clips of one epoch over copies of a file under these names, and over other files."""
    rows = []
    for name in names:
        (folder / name).write_bytes(source.read_bytes())
        technical = {"fps": 25, "num_frames": 60, "height": 64, "width": 128}
        rows.append({"path": name, "caption": "x", **technical})
    rows += [{**rows[0], "path": str(path)} for path in also]
    manifest = folder / "clips.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    options = {"sizes": ["5x64x128"], "reader": Unruly(), "root": "/"} | settings
    data = data_module(
        manifest, fps=5.0, pixels_per_batch=2 * 5 * 64 * 128, decode_timeout_s=1.0,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    model = Nothing()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, data)
    return model.fed


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_past_hangs_and_crashes_and_counts_them(
    workers: int, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    source = barcodes("source.mp4", STEADY)
    names = [*(f"{number}.mp4" for number in range(8)), "hang.mp4", "crash.mp4"]
    clips = fed(tmp_path, names, source, num_workers=workers, max_bad_share=0.2)
    assert len(clips) == 10
    assert len(set(clips)) == 8
    lines = (tmp_path / "bad_clips.jsonl").read_text().splitlines()
    reasons = {Path(row["path"]).name: row["reason"] for row in map(json.loads, lines)}
    assert set(reasons) == {"hang.mp4", "crash.mp4"}
    assert len(lines) == 2
    assert "took longer than 1 s" in reasons["hang.mp4"]
    assert "SIGABRT" in reasons["crash.mp4"]


class BareDecord(Reader):
    """decord without the verdict that keeps it from what it cannot read; each time it reads the
    file's last frame too."""

    def read(self, path: Path, timeline: Timeline, indices: Sequence[int]) -> np.ndarray:
        import decord

        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch([*indices, len(reader) - 1]).asnumpy()[:-1]


@pytest.fixture
def endless(barcodes: Callable[..., Path], tmp_path: Path) -> Path:
    """A valid file on which decord loops for ever: a cut without re-encoding out of one long GOP,
    with an edit list."""
    options = {"g": "600", "bf": "3", "x264-params": "scenecut=0:b-pyramid=2:b-adapt=0"}
    source = barcodes("long.mp4", list(range(0, 300 * 33, 33)), options=options)
    return cut_without_encoding(source, tmp_path / "endless.mp4", 5.0, 0.5)


def test_decord_is_stopped_where_it_loops_for_ever_and_the_default_reads_on(endless: Path) -> None:
    reader_in_child = SubprocessReader(BareDecord(), 2.0)
    timeline = reader_in_child.timeline(endless)  # the child is up from here on
    assert "an edit list discards" in str(timeline.decord_objection)
    started = time.monotonic()
    with pytest.raises(DecodeError, match=r"endless\.mp4: took longer than 2 s"):
        reader_in_child.read(endless, timeline, [0])
    assert 1.9 < time.monotonic() - started < 3.0
    last = len(timeline) - 1
    frames = SubprocessReader(default_reader(), 20.0).read(endless, timeline, [0, last])
    with av.open(str(endless)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert numbers_in(frames) == numbers_in(np.stack([shown[0], shown[last]]))


def test_an_epoch_goes_on_past_the_file_on_which_decord_loops(
    endless: Path, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    names = [f"{number}.mp4" for number in range(8)]
    source = barcodes("source.mp4", STEADY)
    clips = fed(
        folder, names, source, reader=BareDecord(), sizes=["1x64x128"], max_bad_share=0.2,
        also=[endless],
    )  # fmt: skip
    assert len(set(clips)) == 8
    (line,) = (folder / "bad_clips.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(endless)
    assert "took longer than 1 s and was stopped" in json.loads(line)["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_clips_stop_the_run_with_one_sentence(
    workers: int, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    names = [*(f"{number}.mp4" for number in range(8)), "crash1.mp4", "crash2.mp4"]
    with pytest.raises(TooManyBadClips) as caught:
        fed(tmp_path, names, barcodes("a.mp4", STEADY), num_workers=workers, max_bad_share=0.1)
    message = str(caught.value)
    assert message.startswith("2 clips cannot be read, more than max_bad_share allows; the last: ")
    assert message.endswith(f"all of them: {tmp_path / 'bad_clips.jsonl'}")
    assert "\n" not in message


def test_a_manifest_of_which_nothing_can_be_read_is_an_error_at_once(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("no video")
    rows = [{"path": name, "caption": "x"} for name in ("a.mp4", "b.mp4")]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = data_module(tmp_path / "clips.jsonl", ["1x8x8"], 8.0, 1000, max_bad_share=1.0)
    with pytest.raises(ValueError, match=r"(?s)no clip is left.*2 left out: cannot be read"):
        data.setup("fit")


def test_each_process_counts_what_all_of_them_name(tmp_path: Path) -> None:
    def record(number: int) -> ClipRecord:
        return ClipRecord(Path(f"{number}.mp4"), ("x",), f"{number:016x}")

    error = DecodeError("torn")
    BadClips(tmp_path / "bad.jsonl").add(record(9), error)  # of an earlier run
    first, second = (BadClips(tmp_path / "bad.jsonl", limit=3) for _ in range(2))
    first.add(record(0), error)
    second.add(record(0), error)
    second.add(record(1), error)
    first.add(record(2), error)
    with pytest.raises(TooManyBadClips, match="4 clips cannot be read"):
        second.add(record(3), error)
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [int(json.loads(line)["clip_id"], 16) for line in lines] == [9, 0, 1, 2, 3]
