"""A filter keeps the rows that it names, and runs no code."""

from __future__ import annotations

from pathlib import Path

import pytest

from sora_lightning.data import ClipRecord, VideoMetadata
from sora_lightning.data.manifest.filters import Filter, sift


def record(**columns: object) -> ClipRecord:
    return ClipRecord(
        Path("a.mp4"), ("x",), "0" * 16, metadata=VideoMetadata(50, 25, 8, 8), columns=columns
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("motion > 1", [2, 3]),
        ("motion >= 1", [1, 2, 3]),
        ("motion<1", [0]),
        ("motion <= 1.0", [0, 1]),
        (" motion == 2e0 ", [2]),
        ("motion != 2", [0, 1, 3]),
        ("name == b", [1]),
        ("name == 'b'", [1]),
        ('name != "b"', [0, 2, 3]),
        ("duration_s > 1.9", [0, 1, 2, 3]),
        ("duration_s > 2.1", []),
    ],
)
def test_a_filter_compares(text: str, kept: list[int]) -> None:
    records = [record(motion=number, name="abcd"[number]) for number in range(4)]
    rule = Filter.parse(text)
    assert [r.columns["motion"] for r in records if rule.keeps(r)] == kept
    assert Filter.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "motion", "motion >", "motion > fast", "motion > nan", "2 < motion < 3",
             "motion > 1 and name == b", "__import__('os') > 1", "motion ~ 2"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        Filter.parse(text)


def test_the_first_filter_against_a_clip_removes_it() -> None:
    records = [record(motion=1, score=1), record(motion=0, score=0), record(motion=1)]
    rules = [Filter.parse("motion > 0.5"), Filter.parse("score > 0.5")]
    kept, removed = sift(records, rules)
    assert kept == records[:1]
    assert [(r, str(rule)) for r, rule in removed] == [
        (records[1], "motion > 0.5"), (records[2], "score > 0.5"),
    ]  # fmt: skip


def test_a_column_that_is_nowhere_or_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row has a column montion; there are duration_s"):
        sift([record(motion=1)], [Filter.parse("montion > 1")])
    with pytest.raises(ValueError, match=r"motion = 'much' of a.mp4 is no number"):
        sift([record(motion="much")], [Filter.parse("motion > 1")])
