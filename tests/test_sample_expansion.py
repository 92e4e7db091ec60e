"""What `sample` does with prompts that are expanded: it samples from the description, and records
both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.inputs import read_entries
from sora_lightning.cli import sample as sample_module
from sora_lightning.cli.expansion import Expansion
from sora_lightning.cli.functions import run_function
from sora_lightning.cli.sample import sample
from tests.test_sample import Painter

PROMPTS = ["a red circle", "a blue square"]
TEMPLATE = "red {prompt} moves"


class Longer:
    """Stands for a model that expands prompts."""

    def __init__(self, version: str) -> None:
        self.version = version

    def expand(self, prompts: Sequence[str]) -> list[str]:
        return [f"{prompt} in the rain" for prompt in prompts]

    def fingerprint(self) -> str:
        return self.version


@pytest.fixture
def painter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Painter:
    monkeypatch.chdir(tmp_path)
    painter = Painter()
    loader = SimpleNamespace(from_checkpoint=lambda path: painter)
    monkeypatch.setattr("sora_lightning.cli.load_for_task.DiffusionSystem", loader)

    def load(self: Expansion, checkpoint: Path, device: str) -> Longer | None:
        return None if self.no_expand else Longer(str(self.expand))

    monkeypatch.setattr(Expansion, "load", load)
    Path("model.ckpt").write_bytes(b"weights")
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    return painter


def _sample(*flags: str, prompts: str = "prompts.txt", output: str = "out") -> list[dict]:
    fixed = ("--checkpoint=model.ckpt", f"--prompts={prompts}", "--num-frames=5")
    run_function("sample", sample, [*fixed, f"--output={output}", *flags])
    lines = Path(output, "prompts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_videos_show_the_description_and_are_scored_against_the_prompt(painter: Painter) -> None:
    rows = _sample()
    described = [f"{prompt} in the rain" for prompt in PROMPTS]
    assert painter.asked == described
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["expanded"] for row in rows] == described
    entries = read_entries(Path("out/prompts.jsonl"))
    assert [entry.prompt for entry in entries] == PROMPTS


def test_no_expand_samples_from_the_prompts_as_they_are(painter: Painter) -> None:
    rows = _sample("--no-expand")
    assert painter.asked == PROMPTS
    assert [row["expanded"] for row in rows] == [None, None]


def test_a_folder_goes_on_with_the_same_expansion_alone(painter: Painter) -> None:
    _sample("--expand=one")
    asked = list(painter.asked)
    _sample("--expand=one")
    assert painter.asked == asked
    for other in ("--expand=two", "--no-expand"):
        with pytest.raises(ValueError, match="a video of other settings"):
            _sample(other)


def test_a_folder_from_before_prompts_were_expanded_goes_on(painter: Painter) -> None:
    rows = _sample("--no-expand")
    record = Path("out/prompts.jsonl")
    old = [{key: value for key, value in row.items() if key != "expanded"} for row in rows]
    record.write_text("".join(json.dumps(row) + "\n" for row in old))
    asked = list(painter.asked)
    assert _sample("--no-expand") == rows
    assert painter.asked == asked


def test_one_prompt_says_what_it_was_expanded_to(
    painter: Painter, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint=model.ckpt", "--num-frames=5", "--output=x.mp4")
    run_function("sample", sample, [*flags, "--prompt=a red circle"])
    assert "a red circle -> a red circle in the rain" in capsys.readouterr().out
    assert painter.asked == ["a red circle in the rain"]


def test_an_instruction_is_not_expanded(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    painter.known_frames = SimpleNamespace(masks=["edits"], needs_source=True)
    monkeypatch.setattr(sample_module, "check_inputs", lambda *_: None)
    instruct = SimpleNamespace(still=False, knows_frames=True, run=lambda job: painter.videos(
        job.prompts, job.size, job.seeds
    ))  # fmt: skip
    monkeypatch.setitem(sample_module.TASKS, "instruct", instruct)
    _sample("--task=instruct")
    assert painter.asked == PROMPTS


def test_prompts_may_stand_in_another_column(painter: Painter) -> None:
    row = {"path": "x.mp4", "caption": "short", "caption_descriptive": ["long", "longer"]}
    Path("clips.jsonl").write_text(json.dumps(row) + "\n")
    rows = _sample("--prompt-column=caption_descriptive", "--no-expand", prompts="clips.jsonl")
    assert [row["prompt"] for row in rows] == painter.asked == ["long"]
    with pytest.raises(ValueError, match=r"--prompts clips.jsonl:1: caption_x: must be a string"):
        _sample("--prompt-column=caption_x", prompts="clips.jsonl", output="other")
