"""Pixels are those that a player shows, whichever way a file stores them."""

from __future__ import annotations

import os
import tempfile
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from sora_lightning.data.decoding import (
    DecodeError,
    PyAVReader,
    Timeline,
    probe,
    read_frames,
    read_timeline,
)
from sora_lightning.data.decoding.encode import reencode, write_video
from sora_lightning.data.decoding.readers import DecordReader, default_reader
from sora_lightning.data.decoding.subprocess_decoding import SubprocessReader, subprocess_map
from tests.data.barcodes import barcode, cut_without_encoding, numbers_in, write_barcodes

HEIGHT, WIDTH = 64, 96
QUARTERS = np.array([[(240, 20, 20), (20, 200, 20)], [(20, 20, 240), (230, 230, 20)]], np.uint8)
PICTURE = QUARTERS.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def close(image: np.ndarray, expected: np.ndarray) -> bool:
    """Return True if two images are equal up to the loss of a codec."""
    return (
        image.shape == expected.shape
        and np.abs(image.astype(float) - expected).mean() < 6  # a swapped quarter makes 50
    )


def encoded(
    path: Path,
    image: np.ndarray = PICTURE,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    turned: tuple[int, bool] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], pix_fmt
        if turned is not None:
            stream.set_display_rotation(*turned)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
            stream.sample_aspect_ratio = aspect
        for _ in range(6):
            form = "rgba" if image.shape[2] == 4 else "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, form)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("turned", list(product((0, 90, 180, 270), (False, True))))
@pytest.mark.parametrize("reader", [default_reader(), PyAVReader()], ids=["default", "pyav"])
def test_all_eight_orientations_are_shown_upright(
    reader: PyAVReader, turned: tuple[int, bool], tmp_path: Path
) -> None:
    degrees, mirrored = turned
    path = encoded(tmp_path / "turned.mp4", turned=turned)
    expected = np.rot90(PICTURE, degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    timeline = read_timeline(path)
    assert mirrored == (timeline.pyav_only is not None)
    assert close(reader.read(path, timeline, [2])[0], expected)
    assert close(read_frames(path)[0][0], expected)
    assert (probe(path).height, probe(path).width) == expected.shape[:2]
    reencode(path, tmp_path / "copy.mp4", 0.0, np.inf)
    assert close(read_frames(tmp_path / "copy.mp4")[0][-1], expected)


@pytest.mark.parametrize(
    ("aspect", "width"), [("2", 192), ("1/2", 48), ("4/3", 128), ("1001/1000", 96)]
)
def test_pixels_that_are_not_square_are_widened(aspect: str, width: int, tmp_path: Path) -> None:
    path = encoded(tmp_path / "wide.mp4", aspect=Fraction(aspect))
    timeline = read_timeline(path)
    assert (timeline.decord_objection is None) == (width == WIDTH)
    expected = QUARTERS.repeat(HEIGHT // 2, 0).repeat(width // 2, 1)
    assert close(default_reader().read(path, timeline, [3])[0], expected)
    reencode(path, tmp_path / "copy.mp4", 0.0, np.inf)
    assert close(read_frames(tmp_path / "copy.mp4")[0][0], expected)
    turned = encoded(tmp_path / "turned.mp4", aspect=Fraction(aspect), turned=(90, True))
    shown = np.rot90(expected)[:, ::-1]  # widened as it is stored, then turned
    assert close(default_reader().read(turned, read_timeline(turned), [3])[0], shown)


def test_the_stream_that_players_choose_is_read_by_all(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    small, large = np.full((32, 32, 3), (255, 0, 0), np.uint8), np.full_like(PICTURE, (0, 0, 255))
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream, image in zip(streams, (small, large), strict=True):
            stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv444p"
        streams[0].disposition, streams[1].disposition = Disposition.dub, Disposition.default
        for _ in range(6):
            for stream, image in zip(streams, (small, large), strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    timeline = read_timeline(path)
    assert str(timeline.decord_objection).startswith("2 video streams")
    for reader in (default_reader(), PyAVReader()):
        assert close(reader.read(path, timeline, [1])[0], large)
    assert (probe(path).height, probe(path).width) == large.shape[:2]


# EXIF's words: where the stored first row and first column are shown.
EXIF = {
    1: PICTURE,
    2: PICTURE[:, ::-1],
    3: PICTURE[::-1, ::-1],
    4: PICTURE[::-1],
    5: PICTURE.swapaxes(0, 1),
    6: np.rot90(PICTURE, -1),
    7: PICTURE.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(PICTURE),
}


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_are_turned_by_their_exif(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(PICTURE).save(path, exif=exif, quality=95)
    assert close(default_reader().read(path, read_timeline(path), [0])[0], EXIF[orientation])


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    (image,), _ = read_frames(tmp_path / "ramp.png")
    np.testing.assert_array_equal(image[..., 1], np.arange(256).reshape(16, 16))


def test_a_level_of_grey_that_a_png_does_not_show_is_white(tmp_path: Path) -> None:
    levels = np.array([[0, 300], [40_000, 65_535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "clear.png", transparency=300)
    (image,), _ = read_frames(tmp_path / "clear.png")
    assert image[..., 0].tolist() == [[0, 255], [156, 255]]


def test_levels_without_a_range_are_refused(tmp_path: Path) -> None:
    """From 0 to 1 they would all be black."""
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tif")
    for read in (read_timeline, read_frames):
        with pytest.raises(DecodeError, match=r"f\.tif: floating point levels"):
            read(tmp_path / "f.tif")


def test_of_a_cameras_file_of_several_images_it_is_the_first(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = Image.fromarray(PICTURE[::-1]).resize((24, 16))
    Image.fromarray(PICTURE).save(
        tmp_path / "phone.jpg",
        format="MPO",
        save_all=True,
        append_images=[small],
        quality=95,
        exif=exif,
    )
    assert close(read_frames(tmp_path / "phone.jpg")[0][0], EXIF[6])


@pytest.mark.parametrize("name", ["clear.png", "clear.webp", "clear.gif", "clear.mov"])
def test_what_is_transparent_is_white_and_not_what_it_hides(name: str, tmp_path: Path) -> None:
    pixels = np.full((48, 64, 4), (255, 0, 0, 255), np.uint8)
    pixels[:, 32:, 3] = 0
    if name.endswith(".mov"):
        encoded(tmp_path / name, pixels, "qtrle", "argb")
    else:
        Image.fromarray(pixels).save(
            tmp_path / name, **({"lossless": True} if "webp" in name else {})
        )
    image = read_frames(tmp_path / name)[0][0].astype(int)
    assert np.abs(image[:, :32] - (255, 0, 0)).max() <= 2
    assert np.abs(image[:, 32:] - 255).max() <= 2


def test_half_a_transparency_is_half_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8, 4), (200, 0, 100, 128), np.uint8)).save(tmp_path / "half.png")
    (image,), _ = read_frames(tmp_path / "half.png")
    expected = [round(level * 128 / 255 + 255 * 127 / 255) for level in (200, 0, 100)]
    assert image[3, 4].tolist() == expected


def test_an_animation_that_is_called_an_image_is_named(tmp_path: Path) -> None:
    frames = [Image.fromarray(barcode(number)) for number in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for read in (read_timeline, probe, read_frames):
        with pytest.raises(DecodeError, match=r"moving\.webp: an animated WEBP: convert it"):
            read(tmp_path / "moving.webp")


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A few kilobytes that say they are 12,000 x 12,000 pixels."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DecodeError, match=r"bomb\.png: .*pixels"):
        read_timeline(tmp_path / "bomb.png")


def test_a_name_with_a_colon_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_barcodes(tmp_path / "clip:1.mp4", [0, 40, 80])
    monkeypatch.chdir(tmp_path)
    path = Path("clip:1.mp4")
    for reader in (PyAVReader(), default_reader()):
        assert numbers_in(reader.read(path, read_timeline(path), [0, 2])) == [0, 2]


@pytest.mark.parametrize("rate", [0.5, 8.0, 23.976, 60.0])
@pytest.mark.parametrize("num_frames", [1, 7])
def test_a_copy_lasts_as_long_as_its_source(rate: float, num_frames: int, tmp_path: Path) -> None:
    frames = np.stack([barcode(number) for number in range(num_frames)])
    write_video(tmp_path / "source.mp4", frames, rate)
    reencode(tmp_path / "source.mp4", tmp_path / "copy.mp4", 0.0, np.inf)
    source, copy = (read_timeline(tmp_path / f"{name}.mp4") for name in ("source", "copy"))
    assert len(copy) == len(source) == num_frames
    assert copy.end_s == pytest.approx(source.end_s, rel=1e-3)
    assert copy.fps == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("start_s", [0.0, 0.44, 1.2])
def test_a_window_holds_what_is_on_screen_in_it(start_s: float, tmp_path: Path) -> None:
    path = write_barcodes(tmp_path / "long.mp4", list(range(0, 60 * 40, 40)))
    frames, fps = read_frames(path, start_s, start_s + 0.8)
    first = round(start_s * 25)
    assert numbers_in(frames) == list(range(first, first + 20))
    assert fps == pytest.approx(25)
    frames, fps = read_frames(path, start_s, start_s + 0.8, fps=5.0)
    assert (numbers_in(frames), fps) == (list(range(first, first + 20, 5)), 5.0)
    with pytest.raises(DecodeError, match=r"long\.mp4: no frame is shown from 2\.5 to"):
        read_frames(path, 2.5, 2.8)


def test_frames_that_an_edit_list_discards_are_not_counted(tmp_path: Path) -> None:
    options = {"g": "24", "bf": "2", "x264-params": "open-gop=0:scenecut=0"}
    source = write_barcodes(tmp_path / "s.mp4", list(range(0, 2400, 40)), options=options)
    path = cut_without_encoding(source, tmp_path / "cut.mp4", 0.7)
    frames, _ = read_frames(path)
    assert len(frames) == len(read_timeline(path))
    numbers = numbers_in(frames)
    assert numbers == list(range(numbers[0], 60))
    assert numbers[0] in (17, 18)


@pytest.mark.parametrize("name", ["secret.mp4", "secret.png"])
def test_a_file_without_read_permission_is_one_bad_clip(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / name
        path.write_bytes(b"nothing of interest")
        path.chmod(0)
        was = os.geteuid()
        try:
            os.seteuid(65534 if was == 0 else was)  # root may read everything
        except OSError:
            pytest.skip("this namespace has root alone")
        try:
            with pytest.raises(DecodeError, match=rf"{name}: Permission denied"):
                read_timeline(path)
        finally:
            os.seteuid(was)


class Greedy(PyAVReader):
    """A decoder that finds no memory."""

    def timeline(self, path: Path) -> Timeline:
        raise MemoryError


def _greedy(path: Path) -> None:
    raise MemoryError


def test_a_decoder_without_memory_costs_one_clip(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"x\.mp4: needs too much memory"):
        SubprocessReader(Greedy(), 5.0).timeline(tmp_path / "x.mp4")
    results = list(subprocess_map(_greedy, [tmp_path], num_workers=1, timeout_s=5.0))
    assert [str(result) for result in results] == ["needs too much memory"]


def test_decord_reads_what_is_plain() -> None:
    """The objections cost no speed where they need not."""
    with tempfile.TemporaryDirectory() as folder:
        path = encoded(Path(folder) / "plain.mp4", pix_fmt="yuv420p")
        timeline = read_timeline(path)
        assert timeline.decord_objection is timeline.pyav_only is None
        assert close(DecordReader().read(path, timeline, [2])[0], PICTURE)
