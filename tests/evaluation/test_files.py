"""Folders of frames and tensors are read as the same pixels in a file would be, and refused where
they are not what their rows say.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation.files import VideoFile
from evaluation.inputs import read_entries, read_folder, read_video

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 20, 28, 3), dtype=np.uint8)


def frame_folder(root: Path) -> Path:
    folder = root / "frames"
    folder.mkdir()
    for index, frame in enumerate(LEVELS):
        Image.fromarray(frame).save(folder / f"frame_{index}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


def saved(root: Path, suffix: str, layout: str = "F H W 3", range: str | None = None) -> VideoFile:
    axes = {"F H W 3": (0, 1, 2, 3), "3 F H W": (3, 0, 1, 2), "F 3 H W": (0, 3, 1, 2)}[layout]
    tensor = torch.from_numpy(LEVELS).permute(axes).contiguous()
    if range == "0..1":
        tensor = tensor.float() / 255
    elif range == "-1..1":
        tensor = tensor.float() / 127.5 - 1
    path = root / f"video{suffix}"
    if suffix == ".pt":
        torch.save(tensor, path)
    elif suffix == ".npy":
        np.save(path, tensor.numpy())
    else:
        save_file({"video": tensor}, path)
    return VideoFile(path, 6.0, layout, range)


def test_frames_of_a_folder_follow_their_numbers(tmp_path: Path) -> None:
    """Frame 10 comes after frame 9. At 6 frames a second, every other one is asked for."""
    file = VideoFile(frame_folder(tmp_path), fps=6.0)
    assert np.array_equal(file.frames(range(12)), LEVELS)
    assert np.array_equal(read_video(file, 6, 3.0), LEVELS[::2])
    assert np.array_equal(read_video(VideoFile(file.path), 12, None), LEVELS)
    assert file.check() == (20, 28)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize("layout", ["F H W 3", "3 F H W", "F 3 H W"])
@pytest.mark.parametrize("range", [None, "0..255", "0..1", "-1..1"])
def test_a_tensor_gives_the_levels_back(
    tmp_path: Path, suffix: str, layout: str, range: str | None
) -> None:
    file = saved(tmp_path, suffix, layout, range)
    assert np.array_equal(read_video(file, 12, 6.0), LEVELS)
    assert np.array_equal(read_video(file, 4, 3.0, window="start"), LEVELS[:8:2])
    assert file.check() == (20, 28)


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".webm"])
def test_containers_of_other_kinds_are_read(tmp_path: Path, suffix: str) -> None:
    codecs = {".avi": "mpeg4", ".mp4": "mpeg4", ".webm": "libvpx-vp9"}
    path = tmp_path / f"x{suffix}"
    gray = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 32 * 32 * 3).reshape(12, 32, 32, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codecs[suffix], rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in gray:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_video(VideoFile(path), 12, 10.0)
    assert np.abs(video.mean(axis=(1, 2, 3)) - gray.mean(axis=(1, 2, 3))).max() < 6
    assert np.all(np.diff(video.mean(axis=(1, 2, 3))) > 5)


@pytest.mark.parametrize(
    ("tensor", "said", "message"),
    [
        (torch.zeros(4, 8, 8, 3), {}, "its row says no 'layout'; it must be one of F H W 3"),
        (torch.zeros(4, 8, 8, 3), {"layout": "T C H W"}, "says 'layout' 'T C H W'"),
        (torch.zeros(4, 8, 8, 3), {"layout": "3 F H W"}, r"\(4, 8, 8, 3\), not 3 F H W"),
        (torch.zeros(4, 8, 8, 3), {"layout": "F H W 3"}, "'range' None; they must be uint8, or"),
        (torch.full((4, 8, 8, 3), -0.5), {"layout": "F H W 3", "range": "0..1"}, "not in 0..1"),
        (torch.full((4, 8, 8, 3), 200.0), {"layout": "F H W 3", "range": "-1..1"}, "not in -1..1"),
        # Taken for levels it would be nearly black.
        (torch.full((4, 8, 8, 3), 0.9), {"layout": "F H W 3", "range": "0..255"}, "not in 0..255"),
        (torch.full((4, 8, 8, 3), torch.nan), {"layout": "F H W 3", "range": "0..1"}, "nan"),
        (torch.zeros(4, 8, 8, 3).byte(), {"layout": "F H W 3", "range": "0..1"}, "is uint8"),
        (torch.zeros(4, 8, 8, 3).int(), {"layout": "F H W 3"}, "type torch.int32"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, {"layout": "F H W 3"}, "holds 2 values"),
    ],
)
def test_tensors_of_another_layout_or_range_are_refused(
    tmp_path: Path, tensor: Any, said: dict[str, str], message: str
) -> None:
    torch.save(tensor, tmp_path / "x.pt")
    file = VideoFile(tmp_path / "x.pt", 8.0, **said)
    with pytest.raises(ValueError, match=message) as refused:
        file.check()
    assert "x.pt" in str(refused.value)


def test_without_a_rate_only_successive_frames_can_be_evaluated(tmp_path: Path) -> None:
    file = VideoFile(frame_folder(tmp_path))
    assert len(read_video(file, 10, None)) == 10
    with pytest.raises(ValueError, match=r"frames: has no frame rate; its row must say 'fps'"):
        read_video(file, 4, 8.0)


def test_frames_of_two_sizes_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path)
    Image.new("RGB", (30, 20)).save(folder / "frame_7.png")
    with pytest.raises(ValueError, match=r"frame_7.png: is 20x30 pixels, and another .* 20x28"):
        VideoFile(folder).frames(range(12))
    (folder / "frame_7.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"frame_7.png: is not an image that can be decoded"):
        VideoFile(folder).frames([7])
    for suffix in (".pt", ".npy", ".safetensors"):
        (tmp_path / f"x{suffix}").write_bytes(b"no tensor")
        with pytest.raises(ValueError, match=rf"x{suffix}: cannot be read as"):
            VideoFile(tmp_path / f"x{suffix}", 8.0, "F H W 3").check()


def test_content_counts_and_not_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    one, other = VideoFile(frame_folder(first)), VideoFile(frame_folder(second))
    assert one.sha256() == other.sha256()
    Image.fromarray(LEVELS[0]).save(other.path / "frame_3.png")
    assert one.sha256() != other.sha256()


def test_rows_say_what_a_file_cannot(tmp_path: Path) -> None:
    saved(tmp_path, ".npy", "3 F H W")
    frame_folder(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        '{"path": "video.npy", "prompt": "a", "fps": 6, "layout": "3 F H W"}\n'
        '{"path": "frames", "prompt": "b", "fps": 6}\n'
    )
    tensor, frames = read_folder(tmp_path)
    assert np.array_equal(read_video(tensor.file, 12, 6.0), read_video(frames.file, 12, 6.0))
    (tmp_path / "prompts.jsonl").write_text('{"path": "frames", "prompt": "b", "fps": 0}\n')
    with pytest.raises(ValueError, match=r"jsonl:1: fps = 0: must be finite"):
        read_entries(tmp_path / "prompts.jsonl")


def test_prompts_may_be_missing_where_no_score_reads_them(tmp_path: Path) -> None:
    saved(tmp_path, ".npy")
    frame_folder(tmp_path)
    entries = read_folder(tmp_path, prompts=False)
    assert [(e.path.name, e.prompt) for e in entries] == [("frames", ""), ("video.npy", "")]
    listing = tmp_path / "listing.jsonl"
    listing.write_text('{"path": "frames"}\n')
    assert read_entries(listing, prompts=False)[0].prompt == ""
    listing.write_text('{"path": "frames", "prompt": " "}\n')
    with pytest.raises(ValueError, match="jsonl:1: prompt = ' ': ' ' is not a caption"):
        read_entries(listing, prompts=False)


def test_frames_are_shown_as_a_player_shows_them(tmp_path: Path) -> None:
    """Turned as EXIF says, and 16 bits scaled to 8."""
    upright = np.zeros((20, 28, 3), np.uint8)
    upright[:10] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned").mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned" / "0.png", exif=exif)
    shown = VideoFile(tmp_path / "turned").frames([0])[0]
    assert shown.shape == (20, 28, 3)
    assert shown[:8].mean() > 190
    assert shown[-8:].mean() < 10
    (tmp_path / "deep").mkdir()
    levels = np.full((20, 28), 100 * 257, np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep" / "0.png")
    assert np.abs(VideoFile(tmp_path / "deep").frames([0]).astype(int) - 100).max() <= 1


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_nothing_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "x.pt")
    np.save("x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for name in ("x.pt", "x.npy"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an array"):
            VideoFile(Path(name), 8.0, "F H W 3").check()
    assert not Path("exploded").exists()


def test_what_would_fill_the_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(2**20, 2**10, 2**10, 3), tmp_path / "x.pt")
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**10, 2**10, 3)}
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(2**20 * 2**20 * 3 + 200)  # a file with a hole: it takes no room
    for suffix in (".pt", ".npy"):
        with pytest.raises(ValueError, match=rf"x{suffix}: holds 3,298,534,883,328 bytes; at most"):
            VideoFile(tmp_path / f"x{suffix}", 8.0, "F H W 3").times()
    (tmp_path / "frames").mkdir()
    Image.new("1", (16000, 16000)).save(tmp_path / "frames" / "0.png")
    with pytest.raises(ValueError, match=r"0.png: (frames of 16000x16000: at most|Image size)"):
        VideoFile(tmp_path / "frames").frames([0])
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"none.npy: has shape \(0, 8, 8, 3\): holds no pixel"):
        VideoFile(tmp_path / "none.npy", 8.0, "F H W 3").check()
