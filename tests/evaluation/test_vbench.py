"""VBench's scores come through from its own package, which a stand-in with its documented interface
takes the place of here.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.__main__ import main
from evaluation.protocol import load_protocol

CALLS: list[dict[str, Any]] = []


class VBench:
    """As github.com/Vchitect/VBench has it at its head, for ``mode="custom_input"``."""

    def __init__(self, device: Any, full_info_dir: str, output_path: str) -> None:
        self.output_path = Path(output_path)

    def evaluate(
        self,
        videos_path: str,
        name: str,
        prompt_list: Any = (),
        dimension_list: list[str] | None = None,
        local: bool = False,
        read_frame: bool = False,
        mode: str = "vbench_standard",
        **kwargs: Any,
    ) -> None:
        assert dimension_list is not None
        CALLS.append({"mode": mode, "prompts": prompt_list, "videos": videos_path})
        # In the folder's order, which is none.
        files = sorted(Path(videos_path).iterdir(), reverse=True)
        assert {one.name for one in files} == set(prompt_list)
        results = {}
        for dimension in dimension_list:
            scale = 100 if dimension == "imaging_quality" else 1
            found = [
                {"video_path": str(one), "video_results": scale * int(one.stem) / 100}
                for one in files
            ]
            if dimension == "dynamic_degree":
                found = [one | {"video_results": one["video_results"] > 0.05} for one in found]
            mean = sum(float(one["video_results"]) for one in found) / len(found) / scale
            results[dimension] = [mean, found]
        path = self.output_path / f"{name}_eval_results.json"
        path.write_text(json.dumps(results))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vbench")
    module.__file__ = "vbench/__init__.py"
    module.VBench = VBench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vbench", module)
    CALLS.clear()


@pytest.fixture
def protocol_file(tmp_path: Path) -> Path:
    content = yaml.safe_load(Path("evaluation/protocols/demo.yaml").read_text())
    content["scores"]["alignment"] = False
    content["scores"]["vbench"] = ["subject_consistency", "dynamic_degree", "imaging_quality"]
    (tmp_path / "vbench.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "vbench.yaml"


def arguments(
    samples: Path, dataset: dict[str, Path], networks: Path, protocol_file: Path
) -> list[str]:
    places = {"videos": samples, "reference": dataset["test"], "networks": networks}
    places |= {"protocol": protocol_file, "output": protocol_file.parent / "report"}
    return [str(part) for key, place in places.items() for part in (f"--{key}", place)]


@pytest.mark.usefixtures("package")
def test_its_scores_stand_in_the_report(
    samples: Path, dataset: dict[str, Path], networks: Path, protocol_file: Path
) -> None:
    assert main(arguments(samples, dataset, networks, protocol_file)) == 0
    report = json.loads((protocol_file.parent / "report" / "report.json").read_text())
    details = report["details"]
    assert report["scores"]["vbench/subject_consistency"] == pytest.approx(0.095)
    assert details["vbench/subject_consistency"]["low"] < 0.095
    assert report["scores"]["vbench/dynamic_degree"] == pytest.approx(14 / 20)
    # Its videos are in another scale than its mean, so that they give no interval.
    assert report["scores"]["vbench/imaging_quality"] == pytest.approx(0.095)
    assert details["vbench/imaging_quality"]["low"] is None
    rows = report["videos"]
    assert [row["vbench/subject_consistency"] for row in rows] == [i / 100 for i in range(20)]
    assert list(CALLS[0]["prompts"].values()) == [row["prompt"] for row in rows]
    assert CALLS[0]["mode"] == "custom_input"
    assert report["settings"]["networks"]["vbench"] == "unknown"


def test_without_the_package_nothing_is_begun(
    samples: Path,
    dataset: dict[str, Path],
    networks: Path,
    protocol_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vbench", None)
    assert main(arguments(samples, dataset, networks, protocol_file)) == 2
    assert "scores.vbench needs the package vbench" in capsys.readouterr().err
    assert not (protocol_file.parent / "report").exists()


def test_other_dimensions_are_refused(protocol_file: Path) -> None:
    content = yaml.safe_load(protocol_file.read_text())
    content["scores"]["vbench"] = ["motion_smoothness", "color"]
    protocol_file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"scores\.vbench\[1\] = 'color': must be one of"):
        load_protocol(str(protocol_file))
