"""A wrong row is refused with its file, line, key and rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sora_lightning.data import VideoMetadata, read_manifest


def write(tmp_path: Path, *rows: object) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_rows_come_in_order_with_paths_beside_the_manifest(tmp_path: Path) -> None:
    technical = {"fps": 8, "num_frames": 20, "height": 64, "width": 48}
    second = {"path": "b.mp4", "caption": ["one", "two"], "start_s": 1, "score": 0.5, **technical}
    first, second_record = read_manifest(
        write(tmp_path, {"path": "a.mp4", "caption": "x"}, "", second)
    )
    assert first.path == tmp_path / "a.mp4"
    assert first.captions == ("x",)
    assert first.metadata is None
    assert second_record.captions == ("one", "two")
    assert second_record.start_s == 1.0
    assert second_record.metadata == VideoMetadata(20, 8, 64, 48)


def test_a_clip_keeps_its_id_whatever_happens_around_it(tmp_path: Path) -> None:
    a, b = {"path": "a.mp4", "caption": "x"}, {"path": "b.mp4", "caption": "y"}
    before = {r.path.name: r.clip_id for r in read_manifest(write(tmp_path, a, b))}
    after = read_manifest(write(tmp_path, b, {**a, "caption": "another"}))
    assert before == {r.path.name: r.clip_id for r in after}
    windows = read_manifest(write(tmp_path, a, {**a, "start_s": 1.0}, {**a, "end_s": 1.0}))
    assert len({record.clip_id for record in windows}) == 3


GOOD = {"path": "a.mp4", "caption": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "clips.jsonl:2: not JSON"),
        ("[" * 10**5, "clips.jsonl:2: not JSON"),
        ("9" * 5000, "clips.jsonl:2: not JSON"),
        ("[1, 2]", "clips.jsonl:2: .* not a JSON object"),
        ({"caption": "x"}, "clips.jsonl:2: path: must name"),
        ({"path": "c.mp4", "caption": "x"}, "clips.jsonl:2: path = 'c.mp4': no such file"),
        ({"path": "b.mp4"}, "clips.jsonl:2: caption: must be"),
        ({"path": "b.mp4", "caption": []}, r"caption = \[\]: must be"),
        ({"path": "b.mp4", "caption": " "}, "caption = ' ': .* is not a caption"),
        # UTF-16 without its mark is UTF-8 with zeros, and half a character no text at all.
        ({"path": "b.mp4", "caption": "x\0 \0y"}, "caption = .* is the file in UTF-8"),
        ({"path": "b.mp4", "caption": "\ud800"}, "caption = .* is the file in UTF-8"),
        ({"path": "b.mp4", "caption": ["x", 3]}, "3 is not a caption"),
        ({"path": "b.mp4", "caption": "x", "fps": 0}, "fps = 0: must be .* at least 0.001"),
        ({"path": "b.mp4", "caption": "x", "height": "64"}, "height = '64': must be a number"),
        ({"path": "b.mp4", "caption": "x", "width": 10**400}, "width = 1000.* must be finite"),
        ({"path": "b.mp4", "caption": "x", "width": 6.5}, "width = 6.5: must be a whole number"),
        ({"path": "b.mp4", "caption": "x", "start_s": 2, "end_s": 1}, "end_s = 1: .* start_s = 2"),
        ({"path": "b.mp4", "caption": "x", "start_s": float("nan")}, "start_s = nan: must be"),
        ({"path": "a.mp4", "caption": "again"}, "clips.jsonl:2: path .* is in line 1"),
        ({"path": "./a.mp4", "caption": "again"}, "clips.jsonl:2: path .* is in line 1"),
    ],
)
def test_a_wrong_row_is_named(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_manifest(write(tmp_path, GOOD, row))


def test_a_manifest_that_is_absent_empty_or_binary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    rules = {"absent.jsonl": "no such", "empty.jsonl": "no rows", "binary.jsonl": "not a JSONL"}
    for name, rule in rules.items():
        with pytest.raises(ValueError, match=f"{re.escape(name)}: .*{rule}"):
            read_manifest(tmp_path / name)
