"""Curves are read whole from event files, once a step, and drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sora_lightning.cli.curves import Curve, curves, read_losses, running_mean


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, start in (("first", 0), ("first", 50), ("second/version_0", 0)):
        with SummaryWriter(tmp_path / name, filename_suffix=f".{start}") as writer:
            for step in range(start, start + 60):
                writer.add_scalar("train/loss", 1000 * start + 1 / (1 + step), step)
            writer.add_scalar("val/loss", 0.5, start + 59)
    return tmp_path


def test_a_resumed_run_counts_each_step_once(runs: Path) -> None:
    losses = read_losses(runs / "first")
    assert losses["train/loss"].steps.tolist() == list(range(110))
    assert (losses["train/loss"].values[50:] > 1000).all()
    assert losses["val/loss"].steps.tolist() == [59, 109]


def test_running_mean_of_a_line_is_the_line() -> None:
    line = Curve(np.arange(30), 3.0 * np.arange(30) + 1)
    mean = running_mean(line, 6)
    assert len(mean.steps) == 25
    np.testing.assert_allclose(mean.values, 3 * mean.steps + 1)


def test_a_panel_a_run_is_drawn(runs: Path) -> None:
    curves(runs, runs / "losses.png")
    with Image.open(runs / "losses.png") as picture:
        assert picture.width > 2.5 * picture.height


def test_runs_are_overlaid_with_a_line_each(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    curves(runs, runs / "losses.png", overlay=True)
    training, validation = drawn[0].axes
    assert (training.get_title(), validation.get_title()) == ("training", "validation")
    for axes in drawn[0].axes:
        assert [line.get_label() for line in axes.lines] == ["first", "second/version_0"]
        assert axes.get_legend() is not None
    assert validation.lines[0].get_xdata().tolist() == [59, 109]


def test_a_folder_without_losses_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no event file below it holds any of \['train/loss'"):
        curves(tmp_path, tmp_path / "losses.png")
    with pytest.raises(ValueError, match=r"losses\.gif: must end in \.png or \.svg"):
        curves(tmp_path, tmp_path / "losses.gif")
