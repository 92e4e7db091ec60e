"""A damaged file gives right frames or an error: never a wrong frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from sora_lightning.data import DecodeError, PyAVReader
from sora_lightning.data.decoding.display import upright_rgb
from sora_lightning.data.decoding.readers import DecordReader, Reader, default_reader
from sora_lightning.data.decoding.subprocess_decoding import (
    SubprocessReader,
)
from sora_lightning.data.decoding.timeline import Timeline, read_timeline
from tests.data.barcodes import numbers_in
from tests.data.decoding.spoil import spoiled
from tests.data.decoding.torchcodec_reader import torchcodec_parameter

STEADY = list(range(0, 60 * 40, 40))
CLOSED = {"g": "12", "bf": "2", "x264-params": "open-gop=0:scenecut=0"}
CLIPS = Path(__file__).resolve().parents[3] / "../shared/clips"


def sequential(path: Path, timeline: Timeline) -> list[tuple[int, np.ndarray]]:
    """Decode a damaged file from first to last, concealed frames too, with timestamps."""
    images: list[tuple[int, np.ndarray]] = []
    converter = VideoReformatter()
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.best("video")):
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, IndexError):
                continue
            for frame in frames:
                # Damage may turn and mirror it, too: tests of the display say what is shown then.
                image = upright_rgb(frame, timeline.pixel_aspect, converter)
                images.append((frame.pts if timeline.timed else len(images), image))
    return images


def assert_right_or_refused(
    sources: Sequence[Path], num_files: int, folder: Path, bare: Reader | None = None
) -> None:
    """Damages the sources in turn; what the default reader returns must stand in a decode from the
    start, at the same time or place.

    That is as much as can be asked: bits flipped within the data of a picture may still make a
    valid picture (often so in VP9, and in HEVC without a hash of its pictures), which no decoder
    can tell from the right one.
    """
    reader = SubprocessReader(bare or default_reader(), timeout_s=60.0)
    served = died = 0
    unnoticed: dict[str, list[float]] = {}
    for number in range(num_files):
        source = sources[number % len(sources)]
        rng = np.random.default_rng([number, len(sources)])
        path = folder / f"{number}{source.suffix}"
        path.write_bytes(spoiled(source.read_bytes(), rng))
        try:
            timeline = reader.timeline(path)
            indices = np.sort(rng.integers(0, len(timeline), 4)).tolist()
            frames = reader.read(path, timeline, indices).astype(int)
        except DecodeError as error:
            died += "crashed" in str(error) or "took longer" in str(error)
            continue
        served += 1
        content = sequential(path, timeline)
        for index, frame in zip(indices, frames, strict=True):
            same_time = [image for pts, image in content if pts == timeline.pts[index]]
            places = [*same_time, *(image for _, image in content[index : index + 1])]
            alike = [image for image in places if image.shape == frame.shape]
            differences = [np.abs(frame - image).mean() for image in alike]
            assert min(differences, default=255) < 5, (source.name, number, index)
        off = differences_from_whole(source, timeline, indices, frames)
        unnoticed.setdefault(codec_of(source), []).extend(off)
    assert not died
    assert num_files / 8 < served < 7 * num_files / 8
    print(f"{num_files} files: {num_files - served} refused, {served} served")
    for codec, off in sorted(unnoticed.items()):
        by_bound = ", ".join(f"{sum(d > b for d in off)} by more than {b}" for b in (0, 1, 5))
        print(f"{codec}: of {len(off)} frames served, from the undamaged file's differ {by_bound}")


def differences_from_whole(
    source: Path, timeline: Timeline, indices: Sequence[int], frames: np.ndarray
) -> list[float]:
    """How far each frame of a damaged file is from the undamaged file's at the same time or place,
    the nearer of them: mean absolute difference, of 255.
    """
    whole = read_timeline(source)
    differences = []
    for index, frame in zip(indices, frames, strict=True):
        at_time = np.flatnonzero(whole.pts == timeline.pts[index]).tolist()
        places = sorted({*at_time, min(index, len(whole) - 1)})
        images = PyAVReader().read(source, whole, places).astype(int)
        comparable = images.shape[1:] == frame.shape
        off = np.abs(images - frame).mean((1, 2, 3)).min() if comparable else 255.0
        differences.append(float(off))
    return differences


def codec_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.name


@pytest.fixture
def fixtures(barcodes: Callable[..., Path]) -> list[Path]:
    hevc = {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=0"}}
    mpeg4 = {"codec": "mpeg4", "options": {"g": "12", "qscale": "2"}}
    vp9 = {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}
    return [
        barcodes("closed.mp4", STEADY, options=CLOSED),
        barcodes("hevc.mp4", STEADY, **hevc),
        barcodes("stream.ts", STEADY, options=CLOSED),
        barcodes("mpeg4.avi", STEADY, **mpeg4),
        barcodes("vp9.webm", STEADY, **vp9),
    ]


def test_damaged_files_give_right_frames_or_none(fixtures: list[Path], tmp_path: Path) -> None:
    assert_right_or_refused(fixtures, 60, tmp_path)


@pytest.mark.parametrize("reader", [torchcodec_parameter()])
def test_torchcodec_paints_over_damage_and_is_found_out(
    reader: Reader, fixtures: list[Path], tmp_path: Path
) -> None:
    assert_right_or_refused(fixtures, 60, tmp_path, reader)


@pytest.mark.slow
def test_a_thousand_damaged_files_give_right_frames_or_none(
    fixtures: list[Path], tmp_path: Path
) -> None:
    real = sorted((CLIPS / "train").iterdir()) if CLIPS.is_dir() else []
    small = [path for path in real if path.stat().st_size < 2**21]
    assert_right_or_refused(fixtures * 10 + small, 1000, tmp_path)


def noise(path: Path, codec: str) -> Path:
    """Write frames whose packets are of a thousand bytes and more."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 25, options={"g": "6", "x265-params": "log-level=0"})
        stream.width = stream.height = 64
        for _ in range(12):
            image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.h264", "libx264"), ("a.mkv", "libx265")]
)
def test_a_hole_of_zeros_is_never_read_on(name: str, codec: str, tmp_path: Path) -> None:
    """Decoders notice not all of them."""
    source = noise(tmp_path / name, codec)
    whole, content = read_timeline(source), source.read_bytes()
    wanted = list(range(len(whole)))
    right = PyAVReader().read(source, whole, wanted)
    with av.open(str(source)) as container:
        packets = [packet.pos for packet in container.demux(video=0) if packet.size > 900]
    rng = np.random.default_rng(0)
    path = source.with_stem("hole")
    for position in rng.choice(packets, 12):
        begin = position + int(rng.integers(200, 800))
        path.write_bytes(content[:begin] + bytes(9) + content[begin + 9 :])
        with pytest.raises(DecodeError, match="hole"):
            PyAVReader().read(path, read_timeline(path), wanted)
        assert read_timeline(path).pyav_only
    path.write_bytes(content)
    np.testing.assert_array_equal(PyAVReader().read(path, read_timeline(path), wanted), right)
    assert read_timeline(path).pyav_only == whole.pyav_only


def test_decord_paints_over_damage_and_is_found_out(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    whole = barcodes("whole.mp4", STEADY, options=CLOSED)
    content = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, length = packets[24]
    content[position + length // 2 : position + length] = bytes(length - length // 2)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    timeline = read_timeline(path)
    assert timeline.decord_objection is None
    reader_in_child = SubprocessReader(DecordReader(), 10.0)
    assert DecordReader().read(path, timeline, [25, 30]).shape == (2, 64, 128, 3)
    for sound in ([3, 9], [50, 52]):
        assert numbers_in(reader_in_child.read(path, timeline, sound)) == sound
    with pytest.raises(DecodeError, match=r"damaged.mp4"):
        reader_in_child.read(path, timeline, [25, 30])
