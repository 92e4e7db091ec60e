"""Both trainings run on real video of many codecs and sizes, learn from it, and a checkpoint
samples.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sora_lightning.__main__ import main
from sora_lightning.data.decoding.readers import read_frames

_ROOT = Path(__file__).resolve().parents[1]
_CLIPS = _ROOT.parent / "shared" / "clips"


@pytest.mark.skipif(not (_CLIPS / "captions.jsonl").is_file(), reason=f"no real clips in {_CLIPS}")
def test_real_video_trains_both_models_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments").symlink_to(_ROOT / "experiments")
    rows = (_CLIPS / "captions.jsonl").read_text().splitlines()
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("\n".join(_moved(row) for row in rows))
    data = ("--data.manifest", str(manifest), "--data.val_manifest", str(manifest))
    small = ("--data.batching.sizes=[9x32x48]", "--data.batching.pixels_per_batch=56000")
    common = (
        *data,
        *small,
        f"--data.reading.root={_CLIPS}",
        "--trainer.log_every_n_steps=1",
        "--trainer.max_steps=16",
    )
    often = ("--trainer.val_check_interval=16",)
    tokenizer = ("--config", "experiments/own_clips/tokenizer_gpu.yaml")
    narrow = (
        "--model.init_args.tokenizer.init_args.widths=[16,32,64]",
        "--model.init_args.warmup_steps=5",
    )
    assert main(["fit", *tokenizer, *common, *often, *narrow]) == 0
    assert main(["predict", *tokenizer, *common, *narrow, "--ckpt_path", "last"]) == 0
    little = (
        "--model.init_args.denoiser.init_args.size.depth=4",
        "--model.init_args.warmup_steps=5",
        "--trainer.callbacks=null",  # their videos are those of clips/test.jsonl
    )
    text = ("--config", "experiments/own_clips/text_to_video_gpu.yaml")
    assert main(["fit", *text, *common, *often, *little]) == 0
    for run in ("tokenizer", "text_to_video"):
        losses = _losses(Path("runs/own_clips", f"{run}_gpu"))
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    checkpoint = "runs/own_clips/text_to_video_gpu/checkpoints/last.ckpt"
    one = (
        "--prompt",
        "a brown rabbit sits in green grass",
        "--size=32x48",
        "--num-steps=4",
        "--num-frames=9",
    )
    assert main(["sample", "--checkpoint", checkpoint, *one, "--output=x.mp4"]) == 0
    assert read_frames(Path("x.mp4"))[0].shape == (9, 32, 48, 3)


def _moved(row: str) -> str:
    content = json.loads(row)
    return json.dumps({**content, "path": str(_CLIPS / content["path"])})


def _losses(run: Path) -> list[float]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]
