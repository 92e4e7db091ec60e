"""Samples of an ablation's arms for equal prompts and seeds, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sora_lightning.ablations.runs import Run
from sora_lightning.ablations.spec import written_reports
from sora_lightning.cli.contact_sheet import moving_sheet, save_animation
from sora_lightning.data.decoding import read_frames

_NUM_PROMPTS, _CELL = 4, 96


def draw_samples(runs: Sequence[Run], path: Path) -> bool:
    """Write an animation: four prompts, evenly spread over those of a run's first report, in rows,
    and arms in columns, each of its first seed that was scored.

    Returns False, and writes nothing, unless two arms have scored samples of equal prompts.
    """
    reports: dict[str, Path] = {}
    for run in runs:
        for report in list(written_reports(run.folder).values())[:1]:
            reports.setdefault(run.arm, report)
    videos = {arm: _videos(report) for arm, report in reports.items()}
    prompts = [list(of_arm) for of_arm in videos.values()]
    if len(videos) < 2 or not prompts[0] or any(one != prompts[0] for one in prompts):
        return False
    step = max(1, len(prompts[0]) // _NUM_PROMPTS)
    shown = prompts[0][::step][:_NUM_PROMPTS]
    frames, fps = zip(
        *(read_frames(videos[arm][which]) for which in shown for arm in videos), strict=True
    )
    captions = [f"{arm}: {prompt}" for _, prompt in shown for arm in videos]
    sheet = moving_sheet(frames, captions, num_columns=len(videos), cell=_CELL)
    save_animation(sheet, path, fps[0])
    return True


def _videos(report: Path) -> dict[tuple[int, str], Path]:
    """Return the files of a report's videos by seed and prompt, which may have moved since."""
    rows = json.loads(report.read_text(encoding="utf-8"))["videos"]
    names = {(row["seed"], row["prompt"]): row["path"] for row in rows if "prompt" in row}
    files = {which: report.parent / "videos" / Path(path).name for which, path in names.items()}
    return files if all(file.is_file() for file in files.values()) else {}
