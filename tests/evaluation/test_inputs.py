"""Videos are read by time, and lists of them are read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from evaluation.files import VideoFile
from evaluation.inputs import cover, nearest_size, read_entries, read_folder, read_video, squash
from sora_lightning.data.decoding.encode import write_video
from tests.data.barcodes import write_barcodes


def ramp(num_frames: int) -> np.ndarray:
    """Frame i has the gray level 4 i."""
    levels = 4 * np.arange(num_frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, 32, 48, 3)).copy()


def frames_of(video: np.ndarray) -> list[int]:
    return (video.mean(axis=(1, 2, 3)) / 4).round().astype(int).tolist()


@pytest.mark.parametrize("fps", [8, 24, 30])
def test_frames_are_chosen_by_time_from_the_middle(tmp_path: Path, fps: int) -> None:
    """3 s of any rate at 8 frames a second: 2 s from the half second on, within one frame."""
    write_video(tmp_path / "x.mp4", ramp(2 * fps), fps)
    chosen = frames_of(read_video(VideoFile(tmp_path / "x.mp4"), num_frames=8, fps=8.0))
    expected = (0.5 + np.arange(8) / 8) * fps
    assert np.abs(np.array(chosen) - expected).max() <= 1


def test_a_video_of_the_protocol_is_read_whole(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", ramp(17), 8)
    assert frames_of(read_video(VideoFile(tmp_path / "x.mp4"), 17, 8.0)) == list(range(17))


def test_a_variable_rate_counts_by_time(tmp_path: Path) -> None:
    """A second at 4 frames, a second at 8: asked at 4, every frame and then every other one."""
    times = [*range(0, 1000, 250), *range(1000, 2000, 125)]
    path = write_barcodes(tmp_path / "x.mp4", times)
    whole, asked = (read_video(VideoFile(path), *asked) for asked in ((16, 8.0), (8, 4.0)))
    assert np.array_equal(whole[0], whole[1])
    assert np.array_equal(asked, whole[::2])


def test_gif_is_a_video_too(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in ramp(10)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    assert frames_of(read_video(VideoFile(tmp_path / "x.gif"), 5, 5.0)) == [0, 2, 4, 6, 8]


def test_a_short_or_damaged_video_is_refused_by_name(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", ramp(10), 8)
    with pytest.raises(ValueError, match=r"short.mp4: lasts 1.25 s; 17 frames .* take 2.12 s"):
        read_video(VideoFile(tmp_path / "short.mp4"), 17, 8.0)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text.mp4: .*the file is text"):
        read_video(VideoFile(tmp_path / "text.mp4"), 4, 8.0)
    content = (tmp_path / "short.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut.mp4"):
        read_video(VideoFile(tmp_path / "cut.mp4"), 8, 8.0)


def test_cover_keeps_proportions_and_the_centre() -> None:
    video = np.zeros((2, 60, 100, 3), np.uint8)
    rows, columns = np.mgrid[:60, :100]
    video[:, np.hypot(rows - 29.5, columns - 49.5) < 15] = 255
    disc = cover(video, 32, 32)[0, ..., 0] / 255.0
    assert disc.shape == (32, 32)
    height, width = disc.sum(axis=0).max(), disc.sum(axis=1).max()
    assert height == pytest.approx(16, abs=0.3)
    assert width == pytest.approx(16, abs=0.3)
    assert np.allclose(disc, disc[:, ::-1], atol=0.02)
    assert squash(video, 32).shape == (2, 32, 32, 3)


def test_the_nearest_proportions_are_chosen() -> None:
    sizes = [(32, 32), (24, 40), (40, 24)]
    assert nearest_size((120, 72), sizes) == (40, 24)
    assert nearest_size((64, 96), sizes) == (24, 40)


def listed(folder: Path, *rows: object) -> Path:
    path = folder / "prompts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_are_read_with_what_they_say_of_sampling(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").touch()
    prompt = {"path": "x.mp4", "prompt": " a red circle ", "seed": 3, "num_steps": 50, "fps": 8}
    (tmp_path / "y.mp4").touch()
    caption = {"path": "y.mp4", "caption": ["one", "two"]}
    first, second = read_entries(listed(tmp_path, prompt, "", caption))
    assert (first.prompt, first.path, first.sampling) == (
        "a red circle",
        tmp_path / "x.mp4",
        {"seed": 3, "num_steps": 50},
    )
    assert second.wordings == ("one", "two")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "jsonl:2: not JSON"),
        ({"prompt": "a"}, "jsonl:2: path: must name a video file"),
        ({"path": "x.mp4"}, "jsonl:2: caption: must be a string"),
        ({"path": "x.mp4", "prompt": "  "}, "jsonl:2: prompt = '  ': '  ' is not a caption"),
        (
            {"path": "x.mp4", "caption": ["a", ""]},
            r"jsonl:2: caption = \['a', ''\]: '' is not a caption",
        ),
        ({"path": "y.mp4", "prompt": "a"}, "jsonl:2: path = 'y.mp4': .*y.mp4 does not exist"),
        # Listed ten times, one video would count as ten.
        ({"path": "./x.mp4", "prompt": "b"}, "jsonl:2: path = './x.mp4': the same clip stands in"),
        ({"path": "h.mp4", "prompt": "b"}, "jsonl:2: path = 'h.mp4': the same clip stands in"),
        ({"path": "x.mp4", "prompt": "a", "shard": "x.tar"}, "shard = 'x.tar': only videos that"),
        ({"path": "x.mp4", "prompt": "a", "start_s": 3, "end_s": 2}, "jsonl:2: end_s = 2: must"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "x.mp4").touch()
    (tmp_path / "h.mp4").hardlink_to(tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=message):
        read_entries(listed(tmp_path, {"path": "x.mp4", "prompt": "a"}, row))


def test_a_folder_needs_videos_and_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no video"):
        read_folder(tmp_path)
    (tmp_path / "x.mp4").touch()
    with pytest.raises(ValueError, match=r"holds 1 videos and no prompts.jsonl"):
        read_folder(tmp_path)
    listed(tmp_path, "")
    with pytest.raises(ValueError, match="has no rows"):
        read_folder(tmp_path)


@pytest.mark.parametrize("fps", [8.0, None])
def test_a_row_is_its_window_and_no_more(tmp_path: Path, fps: float | None) -> None:
    """Two rows of one file, each a second of it: the reference sees two clips apart."""
    write_video(tmp_path / "x.mp4", ramp(32), 8)
    rows = [{"path": "x.mp4", "prompt": "a", "start_s": s, "end_s": s + 1.5} for s in (0.5, 2.5)]
    first, second = (entry.file for entry in read_entries(listed(tmp_path, *rows)))
    assert frames_of(read_video(first, 12, fps)) == list(range(4, 16))
    assert frames_of(read_video(second, 4, fps, "start")) == list(range(20, 24))
    assert first.sha256() != second.sha256()
    with pytest.raises(ValueError, match=r"x.mp4: (lasts 1.50 s|has 12 frames)"):
        read_video(second, 17, fps)
    with pytest.raises(ValueError, match=r"no frame is shown from 9 to 10 s"):
        read_video(VideoFile(tmp_path / "x.mp4", start_s=9, end_s=10), 4, fps)


def test_a_table_of_another_kind_is_a_listing(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").touch()
    (tmp_path / "y.mp4").touch()
    text = "path,caption\r\nx.mp4,a red circle moves left\r\ny.mp4,one\u2028line\r\n"
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    assert [e.prompt for e in read_entries(tmp_path / "t.csv")] == [
        "a red circle moves left",
        "one\u2028line",
    ]


def test_frames_that_an_edit_list_discards_are_not_counted(tmp_path: Path) -> None:
    """A stream-copied cut from frame 20 on keeps the frames since the key frame 12 and hides
    them."""
    source, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with av.open(str(source), "w") as container:
        options = {"crf": "1", "bf": "2", "g": "12", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in ramp(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    never = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(cut), "w", options=never) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        zero, key = (round(n / 24 / stream.time_base) for n in (20, 12))
        for packet in old.demux(stream):
            if packet.pts is not None and packet.dts >= key - round(2 / 24 / stream.time_base):
                if packet.pts < key:
                    continue
                packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
                packet.stream = copied
                new.mux(packet)
    times, _ = VideoFile(cut).times()
    assert len(times) == 40
    assert np.abs(np.array(frames_of(read_video(VideoFile(cut), 8, 24.0, "start"))) - 20).min() == 0
    for window, first in (("start", 20), ("middle", 36), ("random", 52)):
        chosen = frames_of(read_video(VideoFile(cut), 8, 24.0, window, 1.0))
        assert np.abs(np.array(chosen) - np.arange(first, first + 8)).max() <= 1
