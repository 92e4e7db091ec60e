"""Index says of every file what it is, once; check says what becomes of it."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_lightning.__main__ import main
from sora_lightning.data import read_manifest, write_video
from sora_lightning.data.decoding.encode import reencode
from sora_lightning.data.decoding.readers import default_reader, probe, read_frames
from sora_lightning.data.decoding.timeline import read_timeline
from sora_lightning.data.manifest import index as indexing
from sora_lightning.data.manifest.curation import (
    duplicates,
    look_through,
    pyscenedetect_cuts,
    scene_cuts,
    score,
)
from sora_lightning.data.manifest.tables import parse_rows
from tests.data.barcodes import numbers_in
from tests.data.modules import data_module

STEADY = list(range(0, 60 * 40, 40))
CLOSED = {"g": "12", "bf": "2", "x264-params": "open-gop=0:scenecut=0"}
OPEN = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in parse_rows(path)]


@pytest.fixture
def raw_videos(barcodes: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of a good video, one for PyAV alone, an image, and a file that is none of them."""
    barcodes("closed.mp4", STEADY, options=CLOSED)
    barcodes("open.mp4", STEADY, options=OPEN)
    Image.fromarray(np.full((240, 300, 3), 99, np.uint8)).save(tmp_path / "still.png")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(f"this is {path.stem}")
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_index_fills_in_what_a_probe_says(suffix: str, raw_videos: Path, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    output = tmp_path / "out" / f"clips.{suffix}"
    indexing.index(raw_videos, output)
    records = {record.path.name: record for record in read_manifest(output, root=str(tmp_path))}
    assert set(records) == {"closed.mp4", "open.mp4", "still.png"}
    for name, record in records.items():
        assert record.metadata == probe(raw_videos / name)
        assert record.captions == (f"this is {name.partition('.')[0]}",)
    assert records["closed.mp4"].decord_objection is None
    assert "open GOP" in str(records["open.mp4"].decord_objection)
    rejects = {row["path"]: row["reason"] for row in rows_of(Path(f"{output}.rejects.jsonl"))}
    assert set(rejects) == {"text.mp4", "empty.mp4"}
    assert "Invalid data" in rejects["text.mp4"]


def test_index_goes_on_where_it_stopped_and_sees_what_changed(
    raw_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "clips.jsonl"
    indexing.index(raw_videos, output)
    whole = output.read_text()
    log = tmp_path / ".clips.jsonl.log"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    log.write_text("".join(lines[:3]) + lines[3][:20] + "\n")  # as cut by an interruption
    probed: list[str] = []
    through = indexing.subprocess_map

    def counted(function: Callable, jobs: Iterable, *settings: object) -> object:
        jobs = list(jobs)
        probed.extend(job.path.name for job in jobs)
        return through(function, jobs, *settings)  # type: ignore[arg-type]

    monkeypatch.setattr(indexing, "subprocess_map", counted)
    indexing.index(raw_videos, output)
    assert output.read_text() == whole
    assert len(probed) == 2
    probed.clear()
    os.utime(raw_videos / "open.mp4", ns=(1, 1))
    indexing.index(raw_videos, output)
    assert probed == ["open.mp4"]


def test_a_row_costs_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(function: Callable, jobs: Iterable, *settings: object) -> Iterator:
        technical = {"fps": 8, "num_frames": 9, "height": 8, "width": 8, "content": "0" * 64}
        return ([{**j.row, **technical, "path": str(j.path), "decoder_reason": ""}] for j in jobs)

    monkeypatch.setattr(indexing, "subprocess_map", found)
    peaks = []
    for num_rows in (500, 4500):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        rows = [{"path": "a.mp4", "caption": "x" * 50, "start_s": n} for n in range(num_rows)]
        (folder / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tracemalloc.start()
        indexing.index(folder / "raw.jsonl", folder / "clips.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [row["start_s"] for row in rows_of(folder / "clips.jsonl")] == list(range(num_rows))
    print(f"{(peaks[1] - peaks[0]) / 4000:.0f} bytes a row")
    assert peaks[1] - peaks[0] < 4000 * 200


def test_every_kind_of_bad_file_is_rejected_with_a_reason_of_its_own(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    good = barcodes("good.mp4", STEADY, options=CLOSED)
    content = good.read_bytes()
    with av.open(str(tmp_path / "audio_only.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "zero_bytes.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is a caption, saved under a wrong name.")
    (tmp_path / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    output = tmp_path / "out" / "clips.jsonl"
    indexing.index(tmp_path, output, num_workers=2)
    assert [row["path"] for row in rows_of(output)] == ["../good.mp4"]
    rejects = rows_of(Path(f"{output}.rejects.jsonl"))
    reasons = {row["path"]: row["reason"] for row in rejects}
    expected = {
        "audio_only.mp4": "holds no video stream",
        "garbage.mp4": "no known container",
        "text.mp4": "the file is text",
        "truncated.mp4": "without its index",
        "zero_bytes.mp4": "the file is empty",
    }
    assert set(reasons) == set(expected)
    assert len(rejects) == len(set(reasons.values())) == 5
    assert all(expected[name] in reason for name, reason in reasons.items())


def test_a_folder_of_nothing_readable_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_text("no")
    arguments = ["--source", str(tmp_path), "--output", str(tmp_path / "out.csv")]
    assert main(["index", *arguments]) == 2
    assert "not one of its 1 files can be read: Invalid data" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def scenes(num_scenes: int, length: int, seed: int = 0) -> np.ndarray:
    """Textures that drift, a new one for each scene."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(num_scenes):
        texture = rng.integers(30, 220, (8, 24, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        frames += [np.roll(texture, 2 * step, 1)[:, :96] for step in range(length)]
    return np.stack(frames)


def test_cuts_are_found_where_the_scene_changes_and_nowhere_else(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", scenes(5, 12), fps=12)
    assert scene_cuts(look_through(tmp_path / "a.mp4")) == [0.0, 1.0, 2.0, 3.0, 4.0]
    fade = np.linspace(scenes(1, 1)[0], scenes(1, 1, seed=1)[0], 24).astype(np.uint8)
    write_video(tmp_path / "fade.mp4", fade, fps=12)
    assert scene_cuts(look_through(tmp_path / "fade.mp4")) == [0.0]


def test_pyscenedetect_finds_the_same_cuts(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect", reason="PySceneDetect is not installed")
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw" / "a.mp4", scenes(4, 24), fps=12)
    assert pyscenedetect_cuts(tmp_path / "raw" / "a.mp4") == [0.0, 2.0, 4.0, 6.0]
    for detector in ("own", "pyscenedetect"):
        output = tmp_path / f"{detector}.jsonl"
        indexing.index(tmp_path / "raw", output, scenes=True, detector=detector)
    assert rows_of(tmp_path / "own.jsonl") == rows_of(tmp_path / "pyscenedetect.jsonl")
    write_video(tmp_path / "one.mp4", scenes(1, 24), fps=12)
    assert pyscenedetect_cuts(tmp_path / "one.mp4") == [0.0]


def test_without_pyscenedetect_index_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ValueError, match=r"pip install 'sora-lightning\[scenes\]'"):
        indexing.index(tmp_path, tmp_path / "out.jsonl", scenes=True, detector="pyscenedetect")


def test_scores_tell_moving_still_and_black(tmp_path: Path) -> None:
    still = np.repeat(scenes(1, 1), 12, 0)
    clips = {
        "moving": scenes(1, 12),
        "still": still,
        "black": np.zeros_like(still),
        "half": np.concatenate([still[:6], np.zeros_like(still[:6])]),
    }
    scores = {}
    for name, frames in clips.items():
        write_video(tmp_path / f"{name}.mp4", frames, fps=12)
        scores[name] = score(look_through(tmp_path / f"{name}.mp4"), 0.0, 9.0)
    assert [scores[name].black for name in clips] == [0.0, 0.0, 1.0, 0.5]
    assert [scores[name].static for name in clips] == [0.0, 1.0, 1.0, round(10 / 11, 4)]
    assert scores["moving"].motion > 5 > 0.5 > scores["still"].motion


def test_duplicates_are_found_through_another_encoding(tmp_path: Path) -> None:
    looks = []
    for name, seed, crf in (("a", 0, 12), ("b", 1, 12), ("a again", 0, 30)):
        write_video(tmp_path / f"{name}.mp4", scenes(1, 12, seed), fps=12, crf=crf)
        looks.append(score(look_through(tmp_path / f"{name}.mp4"), 0.0, 9.0).look)
    assert duplicates(zip("xyz", looks, strict=True)).tolist() == [-1, -1, 0]
    again = [("x", looks[0]), ("y", looks[1]), ("x", "0" * 48)]
    assert duplicates(again).tolist() == [-1, -1, 0]
    assert duplicates([("x", "0" * 48), ("y", "0" * 48)]).tolist() == [-1, -1]


def test_duplicates_are_those_of_a_comparison_of_all_with_all() -> None:
    """Random hashes: some are others with up to 15 bits changed, some are flat, some are copies.
    A clip that is a duplicate is not compared with any after it."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (300, 192), dtype=np.uint8)
    bits[rng.integers(0, 300, 20)] = 0
    for target in np.flatnonzero(rng.random(300) < 0.7)[1:].tolist():
        bits[target] = bits[rng.integers(target)]
        bits[target, rng.choice(192, rng.integers(16), replace=False)] ^= 1
    contents = [str(number) for number in rng.integers(0, 280, 300)]
    expected: list[int] = []
    for number, content in enumerate(contents):
        same = [n for n in range(number) if contents[n] == content]
        off = (bits[:number] != bits[number]).sum(axis=1)
        near = [n for n in range(number) if expected[n] < 0 and off[n] <= 10]
        found = (same or (near if bits[number].sum() > 10 else []))[:1] or [-1]
        expected.append(found[0] if found == [-1] or expected[found[0]] < 0 else expected[found[0]])
    looks = [np.packbits(one).tobytes().hex() for one in bits]
    assert 50 < sum(first >= 0 for first in expected) < 250
    assert duplicates(zip(contents, looks, strict=True)).tolist() == expected


def test_index_cuts_scores_and_reencodes(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_video(tmp_path / "raw" / "a.mp4", scenes(3, 12), 12)
    output = tmp_path / "clips.jsonl"
    indexing.index(
        tmp_path / "raw", output, scores=True, scenes=True, reencode_to=tmp_path / "clips"
    )
    rows = rows_of(output)
    assert len(rows) == 3
    for row in rows:
        assert row["num_frames"] == 12
        assert row["decoder"] == "decord"
        assert row["static"] == 0.0
        assert (tmp_path / row["path"]).parent == tmp_path / "clips"
    indexing.index(tmp_path / "raw", tmp_path / "windows.jsonl", scenes=True, min_scene_s=0.5)
    windows = [
        (row.get("start_s", 0.0), row.get("end_s")) for row in rows_of(tmp_path / "windows.jsonl")
    ]
    assert windows == [(0.0, 1.0), (1.0, 2.0), (2.0, None)]


def test_copies_are_scaled_down_by_area(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    columns = np.linspace(0, 240, 96).astype(np.uint8)
    frames = np.broadcast_to(columns[None, None, :, None], (12, 64, 96, 3)).copy()
    write_video(tmp_path / "raw" / "wide.mp4", frames, 12)
    write_video(tmp_path / "raw" / "tall.mp4", frames.swapaxes(1, 2)[:, :, ::2].copy(), 12)
    output, copies = tmp_path / "clips.jsonl", tmp_path / "small"
    indexing.index(tmp_path / "raw", output, reencode_to=copies, short_side=32)
    tall, wide = rows_of(output)
    assert [(row["height"], row["width"], row["num_frames"]) for row in (tall, wide)] == [
        *((96, 32, 12), (32, 48, 12))
    ]
    shown, fps = read_frames(tmp_path / wide["path"])
    assert fps == 12
    expected = frames[0, 0, :, 0].reshape(48, 2).mean(axis=1)
    assert np.abs(shown.mean(axis=(0, 1, 3)) - expected).max() < 3
    with pytest.raises(ValueError, match="short_side = 32: the pixels of the copies"):
        indexing.index(tmp_path / "raw", output, short_side=32)


def test_a_copy_keeps_the_frames_and_their_times(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    times_ms = [0, *np.cumsum(np.random.default_rng(3).integers(20, 300, 59)).tolist()]
    source = barcodes("variable.mkv", times_ms, options=OPEN)
    reencode(source, tmp_path / "copy.mp4", times_ms[10] / 1000, times_ms[50] / 1000)
    timeline = read_timeline(tmp_path / "copy.mp4")
    assert timeline.decord_objection is None
    expected = (np.array(times_ms[10:50]) - times_ms[10]) / 1000
    np.testing.assert_allclose(timeline.times_s, expected, atol=1e-4)
    frames = default_reader().read(tmp_path / "copy.mp4", timeline, list(range(40)))
    assert numbers_in(frames) == list(range(10, 50))


def test_check_says_what_every_rule_removes(
    raw_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clips.jsonl"
    indexing.index(raw_videos, output)
    rows = [{**row, "score": number} for number, row in enumerate(rows_of(output))]
    output.write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "training.yaml"
    config.write_text(
        f"data:\n  manifest: {output}\n  fps: 8\n  filters: ['score > 0']\n  batching:\n"
        "    sizes: [1x200x250, 9x64x128]\n    pixels_per_batch: 100000\n"
    )
    capsys.readouterr()
    assert main(["check", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 clips take part" in printed
    assert "1 left out: filter: not score > 0, e.g. closed.mp4" in printed
    assert main(["check", "--manifest", str(output), "--filters", '["score < 2"]']) == 0
    printed = capsys.readouterr().out
    assert "1 read by decord" in printed
    assert "1 read by pyav: open GOP" in printed
    assert "1 left out: filter: not score < 2" in printed
    assert main(["check"]) == 2
    assert main(["check", "--config", str(config), "--filters", "[oops]"]) == 2


def test_images_and_videos_train_together(raw_videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "clips.jsonl"
    indexing.index(raw_videos, output)
    data = data_module(output, ["1x240x300", "9x64x128"], 8.0, 80_000, run_length=1)
    data.setup("fit")
    shapes = {tuple(batch.pixels.shape[1:]) for batch in data.train_dataloader()}
    assert shapes == {(3, 1, 240, 300), (3, 9, 64, 128)}
