"""Videos that others give to ``sample`` are shown to the model as they are, or refused in a
sentence that names flag or file; none hangs.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sora_lightning.__main__ import main
from tests.systems.test_frame_tasks import TASK_MIXTURE, at_time_zero

_CLIPS = Path(__file__).parents[3] / "shared" / "clips" / "hostile"


def _png(path: Path, width: int, height: int) -> None:
    """Write a small file that declares a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _made(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    (folder / "text.mp4").write_text("no video\n" * 1000)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "fifo.mp4")
    _png(folder / "bomb.png", 60_000, 60_000)
    _png(folder / "short.png", 1000, 1000)
    (folder / "html.gif").write_text("<html></html>")
    made = {path.name: path for path in folder.iterdir()}
    return made | {"folder": folder, "/dev/zero": Path("/dev/zero"), "none": folder / "none.mp4"}


@pytest.fixture
def sample(
    fit: Callable[..., Path],
    diffusion_model: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., int]:
    run = tmp_path_factory.getbasetemp() / "animated"
    last = run / "checkpoints" / "last.ckpt"
    if not last.exists():
        arguments = {**diffusion_model["init_args"], "known_frames": at_time_zero(TASK_MIXTURE)}
        fit({"model": {**diffusion_model, "init_args": arguments}}, run, "--trainer.max_steps=1")

    def call(output: Path, *flags: str) -> int:
        size = ["--size", "16x16", "--num-frames", "5", "--num-steps", "1"]
        given = ["--checkpoint", str(last), "--prompt", "a circle", "--output", str(output)]
        return main(["sample", *given, *size, *flags])

    return call


@pytest.mark.parametrize(
    "name",
    [
        "text.mp4",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("empty.mp4", "loop.mp4", "fifo.mp4", "bomb.png", "short.png", "html.gif")
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "/dev/zero", "none")),
    ],
)
def test_what_is_no_video_is_refused_in_a_sentence(
    name: str, sample: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _made(tmp_path / "made")[name]
    assert sample(tmp_path / "made.mp4", "--task", "animate", "--video", str(path)) in (1, 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sora-lightning sample: ")
    assert str(path) in said
    assert not (tmp_path / "made.mp4").exists()


@pytest.mark.slow
@pytest.mark.skipif(not _CLIPS.is_dir(), reason="needs ../shared/clips")
@pytest.mark.parametrize("flag", ["video", "to"])
def test_hostile_videos_are_shown_or_refused_in_a_sentence(
    flag: str, sample: Callable[..., int], clips: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good = next(clips["train"].parent.rglob("*.mp4"))
    codes = {}
    for path in sorted(_CLIPS.iterdir()):
        inputs = {"video": good, "to": good, flag: path}
        task = ["--task", "connect", "--num-frames", "9", "--video", str(inputs["video"])]
        task += ["--to", str(inputs["to"])]
        output = tmp_path / f"{path.name}.mp4"
        codes[path.name] = sample(output, *task)
        if codes[path.name]:
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("sora-lightning sample: ")
            assert str(path) in said or "a video of 1 frames is shorter" in said
        assert output.exists() == (codes[path.name] == 0)
    assert set(codes.values()) == {0, 2}
    print(codes)
