"""The command prints one table, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.__main__ import main
from sora_lightning.planner import calibrate

_SMALL = {
    "model": {
        "class_path": "sora_lightning.systems.DiffusionSystem",
        "init_args": {
            "tokenizer": {
                "class_path": "sora_lightning.tokenizers.ConvTokenizer",
                "init_args": {"widths": [8, 8, 8, 8], "blocks_per_level": 1},
            },
            "conditioner": {"class_path": "sora_lightning.conditioning.Unconditional"},
            "denoiser": {
                "class_path": "sora_lightning.denoisers.DiT",
                "init_args": {"size": "tiny"},
            },
        },
    },
    "plan": {"sizes": ["1x32x32", "5x32x32"]},
}


def _write(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_it_prints_a_column_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = _write(tmp_path / "plan.yaml", _SMALL), tmp_path / "plan.json"
    assert main(["plan", "--config", config, "--json", str(output)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens")]
    assert row.split() == ["tokens", "4", "8"]
    assert [one["count"]["tokens"] for one in json.loads(output.read_text())] == [4, 8]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"plan": {"sizes": ["17x32"]}}, "17x32"),
        ({"plan": {"device": "H1000"}}, "device = 'H1000': the devices are"),
        ({"plan": {"sizes": []}}, "plan.sizes is missing"),
        (
            {"model": {"init_args": {"tokenizer": {
                "class_path": "sora_lightning.checkpoints.load_tokenizer",
                "init_args": {"checkpoint": "nowhere.ckpt"},
            }}}},
            "nowhere.ckpt does not exist",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    values: dict, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, delta = _write(tmp_path / "plan.yaml", _SMALL), _write(tmp_path / "delta.yaml", values)
    assert main(["plan", "--config", base, "--delta", delta]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert len(error) < 300


def test_calibration_compares_each_part_with_what_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flops_as_seconds(*calls: Callable[[], object]) -> list[float]:
        seconds = []
        for call in calls:
            with FlopCounterMode(display=False) as counter:
                call()
            seconds.append(counter.get_total_flops() / 1e9)
        return seconds

    monkeypatch.setattr(calibrate, "_seconds", flops_as_seconds)
    values = _SMALL | {"data": {"batching": {"sizes": ["5x32x32"], "pixels_per_batch": 10240}}}
    values["plan"] = {}
    assert main(["plan", "--config", _write(tmp_path / "plan.yaml", values), "--calibrate"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("2 clips of 5x32x32")
    errors = {row[:22].strip(): float(row.split()[-1].rstrip("%")) for row in rows}
    assert list(errors) == [
        *("forward", "forward and backward", "whole step"),
        *("tokenizer encode", "tokenizer decode", "activations"),
    ]
    # A machine whose time is its FLOPs is predicted, but for attention, which torch does not count
    # on CPUs. One clip's activations hold a weight's gradient, which more clips share.
    assert abs(errors.pop("activations")) < 20
    assert max(map(abs, errors.values())) < 5, errors
