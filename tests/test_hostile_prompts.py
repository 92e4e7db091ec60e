"""What a prompt or a caption says stays text: in reports, in TensorBoard's pages, and in the names
of files. evaluation/report/test_page.py tests the page of an evaluation; test_sample.py, files.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from evaluation.report.write import _write_tensorboard
from sora_lightning.ablations.report import Table, _html
from sora_lightning.callbacks.samples import SampleVideos
from sora_lightning.cli.record import RunRecord
from sora_lightning.data.manifest.records import LABEL, label_of, one_line
from sora_lightning.systems.captioner import CaptionerSystem
from tests.hostile import HOSTILE


class Page(HTMLParser):
    """The tags of a page, the text of its cells, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.mark.parametrize("prompt", HOSTILE)
def test_the_report_of_an_ablation_shows_text(prompt: str, tmp_path: Path) -> None:
    def page(text: str) -> Page:
        table = Table(text, (text, text), [(text, text)], text)
        return Page(_html(text, text, [table], tmp_path, {}, text))

    shown = page(prompt)
    assert shown.tags == page("plain words").tags
    assert shown.text.replace("\r\n", "\n").count(prompt.replace("\r\n", "\n")) >= 8


def tags_of(folder: Path) -> list[str]:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Tags()["images"]


def is_label(tag: str, kind: str) -> bool:
    name = tag.removeprefix(f"{kind}/")
    return tag.startswith(f"{kind}/") and 0 < len(name) <= LABEL and name.isprintable()


def test_samples_of_a_training_have_names_that_show(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    video = torch.zeros(len(HOSTILE), 3, 1, 8, 8)
    system = SimpleNamespace(
        fps=8.0, generate=lambda *_: video, modules=lambda: [], eval=lambda: None
    )
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], global_step=1)
    callback = SampleVideos(HOSTILE, "1x8x8", len(HOSTILE))
    callback.after_validation(trainer, system)  # type: ignore[arg-type]
    logger.finalize("success")
    tags = tags_of(tmp_path)
    assert len(set(tags)) == len(HOSTILE)
    assert all(is_label(tag, "samples") for tag in tags)


def test_videos_of_an_evaluation_have_names_that_show(tmp_path: Path) -> None:
    videos = [np.zeros((1, 8, 8, 3), np.uint8)] * len(HOSTILE)
    rows = [{"prompt": prompt, "path": "x.mp4"} for prompt in HOSTILE]
    for start in range(0, len(rows), 4):
        report = {"checkpoint": None, "scores": {}, "videos": rows[start : start + 4]}
        output = tmp_path / str(start)
        _write_tensorboard(report, videos, 8.0, output)  # type: ignore[arg-type]
        tags = tags_of(output / "tensorboard")
        assert len(tags) == len(rows[start : start + 4])
        assert all(is_label(tag, "samples") for tag in tags)


def test_a_label_is_the_text_where_that_can_be() -> None:
    assert one_line("a\n\x1b\u202e b\u2028c") == "a b c"
    assert label_of("Ein grüner Kreis, 3×: 👩") == "Ein grüner Kreis, 3×: 👩"
    longs = ["a" * 999 + end for end in "xy"]
    assert len({label_of(one) for one in longs}) == 2


@pytest.mark.parametrize("caption", HOSTILE)
def test_captions_of_a_validation_show_as_they_are(caption: str) -> None:
    texts: list[str] = []
    logger = TensorBoardLogger.__new__(TensorBoardLogger)
    logger._experiment = SimpleNamespace(add_text=lambda tag, text, step: texts.append(text))  # type: ignore[assignment]
    system: Any = SimpleNamespace(loggers=[logger], global_step=1)
    CaptionerSystem._show(system, [caption, "plain"], ["plain", caption])
    page = Page(markdown_to_safe_html(texts[0]))
    assert set(page.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    line = one_line(caption)
    assert [" ".join(cell.split()) for cell in page.cells] == [line, "plain", "plain", line]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_configuration_shows_as_it_is(prompt: str, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--prompts", type=list[str])
    parser.add_argument("--seed", type=str)
    config = parser.parse_object({"prompts": [prompt], "seed": prompt})
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, loggers=[logger], global_step=0)
    RunRecord(parser, config).save_config(trainer, None, "fit")  # type: ignore[arg-type]
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("config/text_summary")[0].tensor_proto.string_val
    page = Page(markdown_to_safe_html(text.decode()))
    assert set(page.tags) <= {"pre", "code"}
    assert yaml.safe_load(page.text)["prompts"] == [prompt]
