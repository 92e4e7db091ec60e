"""The frame that comes is the frame that was asked for, whichever reader brings it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import (
    DecordReader,
    PyAVReader,
    Reader,
    default_reader,
    probe,
)
from sora_lightning.data.decoding.subprocess_decoding import SubprocessCaller
from sora_lightning.data.decoding.timeline import read_timeline
from tests.data.barcodes import barcode, cut_without_encoding, numbers_in
from tests.data.decoding.torchcodec_reader import torchcodec_parameter

pytest.importorskip("decord", reason="decord has no wheel for this machine")

STEADY = list(range(0, 60 * 40, 40))  # 60 frames at 25 frames per second
RNG_STEPS = np.random.default_rng(3).integers(20, 300, 59)
VARIABLE = [0, *np.cumsum(RNG_STEPS).tolist()]
CLOSED = {"g": "12", "bf": "2", "x264-params": "open-gop=0:scenecut=0"}
OPEN = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
HEVC = {"x265-params": "keyint=12:log-level=0"}
READERS = [DecordReader(), PyAVReader()]
ALL_READERS = [
    pytest.param(READERS[0], id="decord"),
    pytest.param(READERS[1], id="pyav"),
    torchcodec_parameter(),
]


def assert_every_frame_is_right(path: Path, reader: Reader, expected: list[int]) -> None:
    timeline = read_timeline(path)
    assert len(timeline) == len(expected)
    rng = np.random.default_rng(0)
    picks = [np.sort(rng.integers(0, len(expected), 5)).tolist() for _ in range(8)]
    for indices in [*picks, [len(expected) - 1], [0]]:
        frames = reader.read(path, timeline, indices)
        assert numbers_in(frames) == [expected[i] for i in indices]


@pytest.mark.parametrize("reader", ALL_READERS)
@pytest.mark.parametrize(
    ("name", "times_ms", "settings"),
    [
        ("closed.mp4", STEADY, {"options": CLOSED}),
        ("open.mp4", STEADY, {"options": OPEN}),
        ("variable.mp4", VARIABLE, {"options": CLOSED}),
        ("variable.mkv", VARIABLE, {"options": CLOSED}),
        ("stream.ts", STEADY, {"options": CLOSED}),
        ("hevc.mp4", STEADY, {"codec": "libx265", "options": HEVC}),
        ("mpeg4.avi", STEADY, {"codec": "mpeg4", "options": {"g": "12", "qscale": "2"}}),
        ("one.mp4", [0], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_random_access_gives_the_frames_asked_for(
    reader: Reader, name: str, times_ms: list[int], settings: dict, barcodes: Callable[..., Path]
) -> None:
    path = barcodes(name, times_ms, **settings)
    assert_every_frame_is_right(path, reader, list(range(len(times_ms))))


@pytest.mark.parametrize("reader", ALL_READERS)
@pytest.mark.parametrize("start_s", [0.3, 0.7, 1.1])
def test_frames_that_a_cut_hides_stay_hidden(
    reader: Reader, start_s: float, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    source = barcodes("long.mp4", STEADY, options={**CLOSED, "g": "24"})
    path = cut_without_encoding(source, tmp_path / "cut.mp4", start_s)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shown = numbers_in(np.stack(frames))
    assert shown[0] >= start_s * 25 - 1
    assert_every_frame_is_right(path, reader, shown)


def test_decord_is_kept_from_what_it_gets_wrong(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    closed = barcodes("closed.mp4", STEADY, options=CLOSED)
    assert read_timeline(closed).decord_objection is None
    cut = cut_without_encoding(closed, tmp_path / "cut.mp4", 0.7)
    objections = {
        "open GOP": barcodes("open.mp4", STEADY, options=OPEN),
        "mpeg-ts": barcodes("stream.ts", STEADY, options=CLOSED),
        "edit list": cut,
        "codec gif": gif(tmp_path / "moving.gif"),
    }
    for reason, path in objections.items():
        assert reason in str(read_timeline(path).decord_objection)


def gif(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width = barcode(0).shape[:2]
        stream.pix_fmt = "rgb8"
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode(number), "rgb24")))
        container.mux(stream.encode())
    return path


def test_the_frame_shown_is_the_last_that_has_begun(barcodes: Callable[..., Path]) -> None:
    timeline = read_timeline(barcodes("variable.mp4", VARIABLE, options=CLOSED))
    np.testing.assert_allclose(timeline.times_s, np.array(VARIABLE) / 1000, atol=1e-9)
    times_s = np.random.default_rng(1).uniform(0, VARIABLE[-1] / 1000, 200)
    begun = [max(i for i, ms in enumerate(VARIABLE) if ms / 1000 <= t) for t in times_s]
    assert timeline.shown_at(times_s).tolist() == begun
    assert timeline.shown_at(timeline.times_s).tolist() == list(range(len(VARIABLE)))
    assert timeline.shown_at(np.array([-1.0, 1e6])).tolist() == [0, len(VARIABLE) - 1]


@pytest.mark.parametrize(("rate", "step"), [(8, 1), (16, 2), (24, 3)])
def test_eight_frames_a_second_are_eight_whatever_the_file_has(
    rate: int, step: int, barcodes: Callable[..., Path]
) -> None:
    times_ms = [round(1000 * i / rate) for i in range(2 * rate + 1)]
    timeline = read_timeline(barcodes(f"{rate}.mkv", times_ms, options=CLOSED))
    assert timeline.shown_at(np.arange(17) / 8).tolist() == list(range(0, 2 * rate + 1, step))
    # This container counts milliseconds, and most of these times lie between two of them.
    assert timeline.shown_at(np.arange(2 * rate) / rate).tolist() == list(range(2 * rate))


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_turned_image_is_set_upright_by_both(
    rotation: int, barcodes: Callable[..., Path]
) -> None:
    path = barcodes("turned.mp4", STEADY[:6], options=CLOSED, rotation=rotation)
    timeline = read_timeline(path)
    by_decord, by_pyav = (reader.read(path, timeline, [1, 3, 4]) for reader in READERS)
    np.testing.assert_array_equal(by_decord, by_pyav)
    upright = np.rot90(by_pyav, -rotation // 90, axes=(1, 2))
    turned_back = upright if numbers_in(upright) == [1, 3, 4] else np.rot90(upright, 2, (1, 2))
    assert numbers_in(turned_back) == [1, 3, 4]
    assert (probe(path).height, probe(path).width) == by_pyav.shape[1:3]


def test_no_pixel_differs_between_the_readers(barcodes: Callable[..., Path]) -> None:
    path = barcodes("closed.mp4", STEADY, options=CLOSED)
    timeline = read_timeline(path)
    by_decord, by_pyav = (reader.read(path, timeline, [2, 30, 31, 59]) for reader in READERS)
    np.testing.assert_array_equal(by_decord, by_pyav)


def test_decord_gives_way_where_it_fails(tmp_path: Path, barcodes: Callable[..., Path]) -> None:
    path = barcodes("closed.mp4", STEADY[:4], options=CLOSED)
    narrow = tmp_path / "narrow.mp4"
    with av.open(str(narrow), "w") as container:  # decord cannot read rows of this width
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 72, "yuv420p"
        for number in range(4):
            image = np.full((64, 72, 3), 50 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    timeline = read_timeline(narrow)
    assert timeline.decord_objection is None
    frames = DecordReader().read(narrow, timeline, [0, 2, 3])
    assert np.abs(frames.mean((1, 2, 3)) - [0, 100, 150]).max() < 8
    assert len(READERS[0].read(path, read_timeline(path), [0])) == 1


def test_what_is_no_video_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in ("absent.mp4", "empty.mp4", "text.mp4", "sound.mp4"):
        with pytest.raises(DecodeError, match=name):
            read_timeline(tmp_path / name)


def test_damaged_frames_are_refused_not_replaced(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    whole = barcodes("whole.mp4", STEADY, options=CLOSED)
    content = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, length in packets[24:36]:
        content[position : position + length] = bytes(length)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    timeline = read_timeline(path)
    for reader in READERS:
        assert numbers_in(reader.read(path, timeline, [3, 9])) == [3, 9]
        assert numbers_in(reader.read(path, timeline, [50, 52])) == [50, 52]
        with pytest.raises(DecodeError, match="damaged"):
            reader.read(path, timeline, [30])


def test_a_frame_that_is_not_there_is_an_error(barcodes: Callable[..., Path]) -> None:
    path = barcodes("closed.mp4", STEADY, options=CLOSED)
    timeline = read_timeline(path)
    shifted = replace(timeline, pts=timeline.pts + 1)  # as of a file that has changed since
    with pytest.raises(DecodeError, match=r"closed.mp4: 2 of 2 frames do not decode"):
        PyAVReader().read(path, shifted, [3, 40])


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.webp"])
def test_an_image_is_a_clip_of_one_frame(name: str, tmp_path: Path) -> None:
    Image.fromarray(barcode(13)).save(tmp_path / name)
    timeline = read_timeline(tmp_path / name)
    assert len(timeline) == 1
    assert numbers_in(default_reader().read(tmp_path / name, timeline, [0])) == [13]
    metadata = probe(tmp_path / name)
    assert (metadata.num_frames, metadata.height, metadata.width) == (1, *barcode(13).shape[:2])


def test_decord_is_the_default_where_it_is_installed() -> None:
    assert isinstance(default_reader(), DecordReader)


@pytest.mark.parametrize("num_cuts", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_no_cut_gives_a_wrong_frame_and_closed_gops_stay_with_decord(
    num_cuts: int, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    """Cuts without re-encoding at random places of closed, open and one long GOP."""
    long = list(range(0, 200 * 40, 40))
    sources = [
        barcodes("closed.mp4", long, options=CLOSED),
        barcodes("open.mp4", long, options=OPEN),
        barcodes("hevc.mp4", long, codec="libx265", options=HEVC),
        barcodes("one_gop.mp4", long, options={**CLOSED, "g": "250"}),
    ]
    assert read_timeline(sources[0]).decord_objection is None
    rng = np.random.default_rng(0)
    by_decord = refused = 0
    for number in range(num_cuts):
        source = sources[number % len(sources)]
        path = cut_without_encoding(source, tmp_path / "cut.mp4", rng.uniform(0, 7))
        with av.open(str(path)) as container:
            images = {f.pts: f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
        timeline = read_timeline(path)
        by_decord += timeline.decord_objection is None
        # Some of an open GOP's first frames stand on the GOP before, which went with the cut: to
        # refuse them is right, to give others in their place is not.
        indices = np.sort(rng.integers(0, len(timeline), 12)).tolist()
        try:
            read = DecordReader().read(path, timeline, indices)
        except DecodeError:
            assert source.name in ("open.mp4", "hevc.mp4")
            refused += 1
            continue
        shown = numbers_in(np.stack([images[int(timeline.pts[i])] for i in indices]))
        assert numbers_in(read) == shown, (source.name, number)
    assert refused <= num_cuts / 8
    assert by_decord < num_cuts / 2  # most cuts hide frames behind an edit list


def test_closed_gops_of_h264_stay_with_decord(barcodes: Callable[..., Path]) -> None:
    """Read in a subprocess, whose stderr must hold no message about them."""
    rng = np.random.default_rng(0)
    kept = 0
    for number in range(20):
        frames = f"bframes={number % 4}:ref={1 + number % 5}:b-pyramid={number % 2 * 2}"
        options = {"g": str(rng.integers(1, 50)), "x264-params": f"open-gop=0:{frames}"}
        path = barcodes(f"{number}.{('mp4', 'mkv', 'mov')[number % 3]}", STEADY, options=options)
        timeline = read_timeline(path)
        _, complaints = SubprocessCaller(20.0)(DecordReader().read, path, timeline, [3, 30, 59])
        kept += timeline.decord_objection is None and not complaints
    assert kept >= 19
