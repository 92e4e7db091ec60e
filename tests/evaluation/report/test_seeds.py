"""Mean and range over reports, and reports that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.__main__ import main
from evaluation.report.seeds import Range, over_seeds


def report(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True)
    whole = {"settings": {"protocol": "demo"}, "videos": [{"prompt": "a red circle"}], **content}
    (folder / "report.json").write_text(json.dumps(whole))
    return folder


def test_mean_lowest_and_highest_of_each_score(tmp_path: Path) -> None:
    folders = [
        report(tmp_path / str(seed), scores={"fvd": fvd, "psnr": 30.0})
        for seed, fvd in enumerate((8.0, 7.0, 12.0))
    ]
    assert over_seeds(folders) == [Range("fvd", 9.0, 7.0, 12.0), Range("psnr", 30.0, 30.0, 30.0)]


def test_rates_of_frame_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        report(tmp_path / str(seed), rates={"loop/closes": {"value": value, "n": 64}})
        for seed, value in enumerate((0.5, 1.0))
    ]
    assert main(["seeds", *map(str, folders)]) == 0
    assert capsys.readouterr().out.split() == ["loop/closes", "0.75", "(0.5", "to", "1)"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"settings": {"protocol": "own"}}, "its protocol is not that of"),
        ({"scores": {"psnr": 1.0}}, "its scores are not those of"),
        ({"videos": [{"prompt": "a blue circle"}]}, "its prompts are not those of"),
    ],
)
def test_reports_of_something_else_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    first = report(tmp_path / "first", scores={"fvd": 1.0})
    second = report(tmp_path / "second", **{"scores": {"fvd": 2.0}, **other})
    with pytest.raises(ValueError, match=f"second: {message} .*first"):
        over_seeds([first, second])


def test_one_report_has_no_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 reports: a range needs at least two"):
        over_seeds([report(tmp_path / "one", scores={"fvd": 1.0})])
    with pytest.raises(ValueError, match="nothing: holds no report"):
        over_seeds([tmp_path / "one", tmp_path / "nothing"])
