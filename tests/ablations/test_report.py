"""The report and the TensorBoard pages say what the runs have written, however many there are."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from sora_lightning.__main__ import main
from sora_lightning.ablations import runs as runs_module
from sora_lightning.ablations.cost import Cost
from sora_lightning.ablations.plan import PlannedArm, read_plan, write_plan
from sora_lightning.ablations.report import differences, write_report
from sora_lightning.ablations.results import read_results
from sora_lightning.ablations.runs import Run, plan_runs
from sora_lightning.ablations.samples import draw_samples
from sora_lightning.ablations.spec import Ablation, Arm, load_ablation
from sora_lightning.ablations.tensorboard import write_hyperparameters, write_tensorboard
from sora_lightning.data.decoding.encode import write_video
from tests.ablations.conftest import ablation, write

_STEPS = (10, 20)
_MOVED = (0.1, 0.2, 0.6, 0.7, 1.0, 1.5)
_SIZES = ("9x32x32", "9x24x40")


def _arm(name: str, *arguments: str) -> PlannedArm:
    return PlannedArm(name, (Path("base.yaml"),), arguments, 20, Cost(1000, 2e9, 80, 1.5, 0.25))


_ARMS = [_arm("joint"), _arm("factorised", "--x.width=8")]


def _write_run(run: Run, offset: float) -> None:
    """An arm is ``offset`` worse, thrice so on average for the two clips that move furthest; a seed
    shifts both arms."""
    training = run.folder / "training"
    training.mkdir(parents=True)
    with SummaryWriter(str(training)) as writer:
        for step in _STEPS:
            writer.add_scalar("val/loss", 100 * run.seed + offset + step, step)
            writer.add_scalar("throughput/step_s", 0.5, step)
    with (run.folder / "clip_losses.csv").open("w") as file:
        file.write("clip,loss,displacement,size,file\n")
        for index, moved in enumerate(_MOVED):
            noise = 0.001 * index * run.seed * offset
            worse = {1.0: 2, 1.5: 4}.get(moved, 1)
            loss = 10 * run.seed + offset * worse + noise
            file.write(f"{index},{loss},{moved},{_SIZES[index % 2]},{index // 3}.mp4\n")
    details = {"alignment/colour": {"value": 0.5, "n": 2, "better": "higher"}}
    videos = [{"colour": True}, {"colour": False}, {"colour": True, "num_expected": 2}]
    (run.folder / "report").mkdir()
    report = {"details": details, "videos": videos}
    (run.folder / "report" / "report.json").write_text(json.dumps(report))


@pytest.fixture
def spec(place: Path, monkeypatch: pytest.MonkeyPatch) -> Ablation:
    monkeypatch.setattr(runs_module, "up_to_date", lambda stages, folder: folder.is_dir())
    return load_ablation(write("ablation.yaml", ablation(seeds=[0, 1, 2])))


def _written(spec: Ablation, left_out: Sequence[str] = ()) -> list[Run]:
    runs = plan_runs(spec, _ARMS)
    for run in runs:
        if run.name not in left_out:
            _write_run(run, 0.0 if run.arm == "joint" else 0.1)
    return runs


def test_results_hold_items_curves_and_displacements(spec: Ablation) -> None:
    result = read_results(_written(spec))[1]
    assert (result.arm, result.seed, result.finished) == ("factorised", 0, True)
    assert result.scores["clip_loss"].values == pytest.approx([0.1] * 4 + [0.2, 0.4])
    assert result.scores["alignment/colour"].values == [1.0, 0.0]  # one shape
    assert result.scores["val/loss"].values == pytest.approx([20.1])
    assert result.displacements == list(_MOVED)
    assert result.sizes == [*_SIZES] * 3
    assert result.step_s == 0.5


def test_protocols_by_name_are_scored_and_plotted_apart(place: Path, spec: Ablation) -> None:
    protocol = {"short": ["--protocol", "demo"], "long": ["--prompt-column", "caption_long"]}
    spec = replace(
        spec, protocol=protocol, scores=["short/alignment/colour", "long/alignment/colour"]
    )
    runs = plan_runs(spec, _ARMS)
    commands = [stage.command for stage in runs[0].stages if stage.name.startswith("evaluation")]
    assert [command[-4:-2] for command in commands] == list(map(tuple, protocol.values()))
    for run, command in itertools.product(runs, commands):
        report = run.folder / Path(command[-1]).relative_to(runs[0].folder)
        report.mkdir(parents=True)
        value = 0.25 if "caption_long" in command else 0.75
        details = {"alignment/colour": {"value": value, "n": 4, "better": "higher"}}
        (report / "report.json").write_text(json.dumps({"details": details, "videos": []}))
    results = read_results(runs)
    assert {name: score.mean for name, score in results[0].scores.items()} == {
        "short/alignment/colour": 0.75,
        "long/alignment/colour": 0.25,
    }
    text = write_report(spec, _ARMS, runs, results).read_text()
    assert "## short/alignment/colour" in text
    assert (spec.output / "protocols.png").is_file()


def test_differences_are_paired_by_seed(spec: Ablation) -> None:
    (found,) = differences(spec, "clip_loss", read_results(_written(spec)))
    mean = np.mean([0.1] * 4 + [0.3] * 2)
    assert found.over_seeds.mean == pytest.approx(mean, rel=0.01)
    assert found.over_seeds.high - found.over_seeds.low < 0.01  # seeds differ by tens
    assert found.verdict == "worse"


def test_arms_over_a_range_of_flops_get_a_power_law(spec: Ablation) -> None:
    arms = [replace(_arm(f"a{i}"), max_steps=20 * 4**i) for i in range(4)]
    spec = replace(spec, arms={arm.name: Arm() for arm in arms}, reference="a0")
    runs = plan_runs(spec, arms)
    for run in runs:
        run.folder.mkdir(parents=True)
        loss = 4.0 ** -int(run.arm[1:])
        (run.folder / "clip_losses.csv").write_text(f"clip,loss,displacement\n0,{loss},\n")
    text = write_report(spec, arms, runs, read_results(runs)).read_text()
    (row,) = text.partition("## Power laws")[2].splitlines()[4:5]
    assert row.startswith("| clip_loss | 1 (1 to 1) |")


def test_the_report_shows_arms_verdicts_strata_and_commands(spec: Ablation) -> None:
    runs = _written(spec)
    path = write_report(spec, _ARMS, runs, read_results(runs))
    text = path.read_text()
    assert "6 of 6 runs are finished" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| factorised | 1,000")]
    assert "2e+09" in row
    assert "4e+10" in row
    assert "1.500" in row
    assert "25.0 %" in row
    assert [line for line in text.splitlines() if line.endswith("| worse |")]
    expected = {"displacement": [0.1, 0.1, 0.3], "size": [0.2, 0.4 / 3], "file": [0.1, 0.7 / 3]}
    heads = {}
    for quantity, of_strata in expected.items():
        lines = text.partition(f"## clip_loss by {quantity}")[2].splitlines()
        heads[quantity], _, row = lines[2:5]
        means = [float(cell.split()[0]) for cell in row.split("|")[2:-1]]
        assert means == pytest.approx(of_strata, abs=0.002)
    assert heads["size"] == "| arm | 9x24x40 | 9x32x32 |"
    assert heads["file"] == "| arm | 0.mp4 | 1.mp4 |"
    commands = text.partition("```sh\n")[2].partition("```")[0].replace("\\\n", "").splitlines()[1:]
    assert [shlex.split(one) for one in commands] == [
        list(run.stages[0].command) for run in runs if run.seed == spec.seeds[0]
    ]
    page = path.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert "worse" in page
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert {row["score"] for row in rows} == {"clip_loss", "alignment/colour", "val/loss"}
    assert len(rows) == 18


def test_samples_of_equal_prompts_stand_side_by_side(spec: Ablation) -> None:
    runs = _written(spec)
    for run in runs:
        report = run.folder / "report"
        level = 0 if run.arm == "joint" else 200
        (report / "videos").mkdir()
        rows = []
        for number in range(6):
            frames = np.full((3, 16, 16, 3), level + 8 * number, dtype=np.uint8)
            frames[1:] //= 2
            write_video(report / f"videos/{number}.mp4", frames, 8)
            rows.append({"path": f"moved/{number}.mp4", "seed": number, "prompt": f"no. {number}"})
        (report / "report.json").write_text(json.dumps({"details": {}, "videos": rows}))
    assert draw_samples(runs, Path("samples.gif"))
    sheet = Image.open("samples.gif")
    assert sheet.n_frames == 2  # of three, the last two are equal
    image = np.asarray(sheet.convert("L"), dtype=int)
    for number, top in enumerate(range(54, 4 * 156, 156)):
        assert image[top, 60] == pytest.approx(8 * number, abs=4)
        assert image[top, 168] == pytest.approx(200 + 8 * number, abs=4)
    text = write_report(spec, _ARMS, runs, read_results(runs)).read_text()
    assert "![Samples of equal prompts and seeds](samples.gif)" in text
    (runs[0].folder / "report/videos/0.mp4").unlink()
    assert not draw_samples(runs, Path("samples.gif"))


def test_a_report_on_some_of_the_runs_says_which_are_there(spec: Ablation) -> None:
    runs = _written(spec, [f"factorised/seed-{seed}" for seed in range(3)])
    text = write_report(spec, _ARMS, runs, read_results(runs)).read_text()
    assert "3 of 6 runs are finished" in text
    assert "| factorised | no finished run |" in text
    assert "displacement" not in text.partition("## Commands")[0]


def test_the_command_reports_without_training(
    spec: Ablation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "ablation.yaml", "--report"]) == 2
    assert "nothing has been run yet" in capsys.readouterr().err
    write_plan(_ARMS, Path("out/plan.json"))
    assert read_plan(Path("out/plan.json")) == _ARMS
    _written(spec, ["factorised/seed-2"])
    assert main(["ablate", "ablation.yaml", "--report"]) == 0
    assert "out/report.md" in capsys.readouterr().out
    assert "5 of 6 runs are finished" in Path("out/report.md").read_text()


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_has_a_run_an_arm_with_mean_and_bounds_over_three_axes(spec: Ablation) -> None:
    runs = _written(spec)
    write_tensorboard(spec, _ARMS, runs, read_results(runs))
    write_tensorboard(spec, _ARMS, runs, read_results(runs))  # replaces, does not add
    events = _events(Path("out/tensorboard/factorised"))
    mean = events.Scalars("val/loss/mean")
    assert [one.step for one in mean] == list(_STEPS)
    assert [one.value for one in mean] == pytest.approx([110.1, 120.1])
    half = 4.302652729911275 * 100 / np.sqrt(3)
    assert events.Scalars("val/loss/low")[0].value == pytest.approx(110.1 - half)
    assert events.Scalars("val/loss/high")[0].value == pytest.approx(110.1 + half)
    assert [one.step for one in events.Scalars("over_gflops/val/loss/mean")] == [20, 40]
    assert [one.step for one in events.Scalars("over_seconds/val/loss/mean")] == [5, 10]
    layout = layout_pb2.Layout()
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(tensor.tensor_proto.string_val[0])
    charts = {(part.title, chart.title): chart for part in layout.category for chart in part.chart}
    (series,) = charts["over GFLOPs", "val/loss"].margin.series
    assert (series.value, series.lower, series.upper) == tuple(
        f"over_gflops/val/loss/{part}" for part in ("mean", "low", "high")
    )
    joint = _events(Path("out/tensorboard/joint"))
    assert set(joint.Tags()["scalars"]) == set(events.Tags()["scalars"])  # they overlay


def test_the_table_of_hyperparameters_names_every_key_before_the_first_run(spec: Ablation) -> None:
    write_hyperparameters(spec, _ARMS)
    metadata = _events(Path("out/tensorboard")).SummaryMetadata("_hparams_/experiment")
    data = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    names = {info.name for info in data.experiment.hparam_infos}
    assert names == {"arm", "seed", "configs", "x.width"}
    assert [info.name.tag for info in data.experiment.metric_infos] == ["clip_loss"]
    runs = _written(spec)
    write_tensorboard(spec, _ARMS, runs, read_results(runs))
    session = _events(Path("out/tensorboard/joint/seed-1"))
    metadata = session.SummaryMetadata("_hparams_/session_start_info")
    data = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    assert data.session_start_info.hparams["x.width"].string_value == "base"
    assert session.Scalars("clip_loss")[0].value == pytest.approx(10)


# TensorBoard's elements stand in shadow trees, which no CSS selector enters.
_VISIBLE = """
const found = [];
const walk = node => {
  if (node.matches(arguments[0]) && node.getClientRects().length) found.push(node);
  for (const child of [...node.children, ...(node.shadowRoot ? node.shadowRoot.children : [])])
    walk(child);
};
walk(document.documentElement);
return found.map(node => node.textContent.trim());
"""


@pytest.fixture
def browser() -> Iterator[Any]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("no chromium with chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1400,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def server(spec: Ablation) -> Iterator[str]:
    runs = _written(spec)
    write_tensorboard(spec, _ARMS, runs, read_results(runs))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-m", "tensorboard.main", "--logdir", "out/tensorboard")
    with subprocess.Popen(
        (*command, "--port", str(port)), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "http://" in line:  # it serves
                break
        yield f"http://localhost:{port}"
        process.kill()


def _shown(browser: Any, selector: str, text: str) -> list[str]:
    """Wait until an element that contains the text is visible; return the texts of all."""
    from selenium.webdriver.support.wait import WebDriverWait

    def look(browser: Any) -> list[str] | None:
        texts: list[str] = browser.execute_script(_VISIBLE, selector)
        return texts if any(text in one for one in texts) else None

    return WebDriverWait(browser, 60).until(look)


@pytest.mark.slow
def test_a_browser_shows_the_margins_and_the_table_of_hyperparameters(
    browser: Any, server: str, tmp_path: Path
) -> None:
    browser.get(f"{server}/#custom_scalars")
    _shown(browser, "tf-custom-scalar-margin-chart-card", "")
    assert _shown(browser, ".heading-row", "val/loss")[0] == "val/loss"
    assert len(_shown(browser, "path.area", "")) >= len(_ARMS)  # a band an arm
    browser.save_screenshot(str(tmp_path / "custom_scalars.png"))
    browser.get(f"{server}/#hparams")
    cells = _shown(browser, ".table-cell", "factorised/seed-2")
    assert {f"{arm.name}/seed-{seed}" for arm in _ARMS for seed in (0, 1, 2)} <= set(cells)
    assert {"base", "8"} <= set(cells)  # x.width of the two arms
    browser.save_screenshot(str(tmp_path / "hparams.png"))
