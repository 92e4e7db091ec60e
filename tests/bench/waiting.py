"""The share of a training step that waits for data, on real clips of many codecs and sizes: the
tokenizer of ``experiments/own_clips`` at 64 x 64, decoded by its one worker as it trains.

The clips lie in ``../shared/clips``; without them there is no row. ``training`` has the rows of the
demo's clips.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from sora_lightning.__main__ import main
from tests.bench.report import Report
from tests.bench.training import timed_steps, waits_of

CLIPS = Path(__file__).parents[2] / ".." / "shared" / "clips"
CONFIG = "experiments/own_clips/tokenizer.yaml"
SIZE = "17x64x64"


def run(report: Report) -> None:
    captions = CLIPS / "captions.jsonl"
    if not captions.is_file():
        print("  no real clips: they lie in ../shared/clips")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = folder / "clips.jsonl"
        rows = map(json.loads, captions.read_text().splitlines())
        clips = [{**row, "path": str((CLIPS / row["path"]).resolve())} for row in rows]
        manifest.write_text("".join(f"{json.dumps(clip)}\n" for clip in clips))
        settings = {
            "run_dir": str(folder / "tokenizer"),
            "data.manifest": str(manifest),
            "data.val_manifest": str(manifest),
            "data.reading.root": str(CLIPS.resolve()),
            "data.batching.sizes": json.dumps([SIZE]),
            "trainer.limit_val_batches": "1",
        }
        given = [f"--{key}={value}" for key, value in settings.items()]
        if main(["fit", "--config", CONFIG, *given, *timed_steps(report, folder, "tokenizer")]):
            raise RuntimeError("the training on real clips failed")
        seconds = json.loads((folder / "fit-tokenizer.txt").read_text())
    case = f"a training step of own_clips' tokenizer on real clips, {SIZE}"
    report.parts(case, waits_of(seconds))
