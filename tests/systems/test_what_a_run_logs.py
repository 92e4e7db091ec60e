"""Counts are those of the batches that were served, on resuming too; FLOPs are those of the meta
device; every logger is given them.
"""

from __future__ import annotations

import csv
import math
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.__main__ import main
from sora_lightning.callbacks.throughput import extent, parameter_counts
from sora_lightning.data import read_manifest
from sora_lightning.data.batching.clip_reader import ClipReader
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.denoisers import DiT
from sora_lightning.flops import FlopCounter
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.types import Condition, PackedBatch, VideoBatch

CSV = "lightning.pytorch.loggers.CSVLogger"


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the values of each optimizer step, counted from 1, from a run's CSV files."""
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(run_dir.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                values = {k: float(v) for k, v in row.items() if v and k not in ("step", "epoch")}
                if "progress/clips" in values:
                    steps[int(row["step"]) + 1] = values
    return steps


@pytest.fixture(scope="module")
def run_dir(fit: Any, tokenizer_model: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer's run of four steps, resumed for two more; a value each step."""
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    arguments = ["--trainer.logger", CSV, "--trainer.logger.save_dir", str(run_dir)]
    arguments += ["--trainer.log_every_n_steps", "1", "--data.batching.sizes", "[5x16x16]"]
    fit({"model": tokenizer_model}, run_dir, *arguments, "--trainer.max_steps", "4")
    resume = ["--ckpt_path", "last", "--trainer.max_steps", "6"]
    fit({"model": tokenizer_model}, run_dir, *arguments, *resume)
    return run_dir


def test_counts_go_on_after_a_resume(run_dir: Path) -> None:
    steps = logged(run_dir)
    assert sorted(steps) == [2, 3, 4, 6]  # the first of each run starts its clock
    for step, values in steps.items():
        assert values["progress/clips"] == 4 * step
        assert values["progress/frames"] == 4 * 5 * step
        assert values["progress/tokens"] == 4 * (3 * 2 * 2) * step
        flops = values["cost/flops_per_step"]
        assert math.isclose(values["progress/flops"], flops * step, rel_tol=1e-6)


def test_speed_and_state_are_logged(run_dir: Path) -> None:
    for values in logged(run_dir).values():
        step_s = values["throughput/step_s"]
        assert math.isclose(values["throughput/clips_per_s"], 4 / step_s, rel_tol=1e-5)
        assert math.isclose(values["throughput/tokens_per_s"], 48 / step_s, rel_tol=1e-5)
        assert 0 <= values["throughput/waiting_s"] < step_s
        share = values["throughput/waiting_s"] / step_s
        assert math.isclose(values["throughput/waiting"], share, rel_tol=1e-5)
        assert 0 < values["optimizer/learning_rate"] < 0.00301
        assert values["optimizer/gradient_norm"] > 0
        assert 0.05 < values["memory/peak_gib"] < 64


def test_flops_are_those_of_the_network_on_the_meta_device(
    run_dir: Path, tokenizer_model: dict
) -> None:
    with torch.device("meta"):
        tokenizer = TokenizerSystem.from_checkpoint(run_dir / "checkpoints/last.ckpt").tokenizer
        tokenizer.requires_grad_(True).train().to("meta")
        video = torch.zeros(4, 3, 5, 16, 16)
        with FlopCounterMode(display=False) as counter:
            tokenizer.decode_raw(tokenizer.posterior(video).mean).sum().backward()
    assert logged(run_dir)[2]["cost/flops_per_step"] == counter.get_total_flops()


def test_check_says_beforehand_what_a_step_costs(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 600
    path = tmp_path / "training.yaml"
    path.write_text(yaml.safe_dump({key: config[key] for key in ("model", "data", "trainer")}))
    assert main(["check", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    clips, flops, seconds, memory, held, there, minutes = re.search(
        r"(\d+) clips of 5x16x16: (\S+) FLOPs, (\S+) s, (\S+) GB\n +(\S+) GB with "
        r"weights.*; the device has (\S+) GB\n +600 steps: (\S+) minutes",
        said,
    ).groups()
    assert float(memory) <= float(held) < float(there)
    assert int(clips) == 4
    assert float(flops) == pytest.approx(logged(run_dir)[2]["cost/flops_per_step"], rel=5e-3)
    assert float(minutes) == pytest.approx(10 * float(seconds), abs=1)
    monkeypatch.setattr("sora_lightning.cli.check_training.device_bytes", lambda device: 1e6)
    assert main(["check", "--config", str(path)]) == 0
    assert "the device has 0.0 GB: too little. Make batches smaller" in capsys.readouterr().out


def test_check_lists_every_problem(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    held = {key: config[key] for key in ("model", "data", "trainer")}
    path = tmp_path / "training.yaml"

    def problems() -> list[str]:
        path.write_text(yaml.safe_dump(held))
        assert main(["check", "--config", str(path)]) == 2
        said = capsys.readouterr()
        assert "4 of 4 clips take part" in said.out
        return said.err.splitlines()

    held["data"]["batching"]["sizes"] = ["5x15x16", "5x16x17"]
    held["trainer"]["accumulate_grad_batches"] = 0
    first, *others = problems()
    assert first.endswith("trainer.accumulate_grad_batches = 0: must be at least 1")
    assert [line.partition(" = ")[0] for line in others] == [
        "data.batching.sizes[0]",
        "data.batching.sizes[1]",
    ]
    held["model"]["init_args"]["tokenizer"]["init_args"]["widths"] = "wide"
    held["model"]["init_args"]["seeed"] = 1
    said = "\n".join(problems())
    assert "model.init_args.seeed: no such key in TokenizerSystem. Did you mean seed?" in said
    assert "model.init_args.tokenizer.init_args.widths = 'wide': expected" in said


def test_a_training_that_waits_for_data_names_the_slowest_file_and_the_remedy_once(
    fit: Any, tokenizer_model: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ClipReader.read

    def read_slowly(self: ClipReader, record: ClipRecord, *window: Any) -> torch.Tensor:
        time.sleep(1.0 if record.path.name == "00003.mp4" else 0.01)
        return read(self, record, *window)

    monkeypatch.setattr(ClipReader, "read", read_slowly)
    arguments = ["--trainer.log_every_n_steps", "3", "--trainer.max_steps", "6"]
    arguments += ["--data.batching.sizes", "[5x16x16]"]  # three steps see every clip
    with pytest.warns(UserWarning, match="the training waits for data") as caught:
        fit({"model": tokenizer_model}, tmp_path / "run", *arguments)
    (said,) = (str(one.message) for one in caught if "waits for data" in str(one.message))
    share, seconds, command, workers = re.search(
        r"data in (\d+)% .*00003\.mp4, (\S+) s a clip\. `sora-lightning (.*)` makes.* than (\d+)",
        said,
    ).groups()
    assert int(share) > 25
    assert 1.0 <= float(seconds) < 3
    assert workers == "0"
    arguments = shlex.split(command)
    arguments[arguments.index("--reencode-to") + 1] = str(tmp_path / "small")
    output = arguments[arguments.index("--output") + 1] = str(tmp_path / "small/train.jsonl")
    assert main(arguments) == 0
    for record in read_manifest(Path(output)):
        assert record.path.parent == tmp_path / "small"
        assert min(record.metadata.height, record.metadata.width) == 16


def test_fused_attention_counts_as_on_the_meta_device() -> None:
    def count(device: str, counting: Any) -> int:
        with torch.device(device):
            denoiser = DiT(4, 16, TransformerSize(depth=2, width=24, num_heads=2), patch=(1, 1, 1))
            x, text = torch.ones(2, 4, 3, 4, 4), torch.ones(2, 5, 16)
            mask = torch.ones(2, 5, dtype=torch.bool)
            with counting as counter:
                denoiser(x, torch.ones(2), Condition(text, mask, text[:, 0])).sum().backward()
        return counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops()

    assert count("cpu", FlopCounter()) == count("meta", FlopCounterMode(display=False)) > 0


def test_the_extent_of_packs_and_of_latents(
    run_dir: Path, diffusion_model: dict, tokenizer_checkpoint: Path
) -> None:
    system = TokenizerSystem.from_checkpoint(run_dir / "checkpoints/last.ckpt")
    names = ["a", "b"]
    latents = VideoBatch(names, 8.0, names, latents=torch.zeros(2, 4, 3, 2, 2))
    assert extent(system, latents) == (2, 10, 24)
    videos = [torch.zeros(3, 5, 16, 16), torch.zeros(3, 1, 24, 16)]
    pack = PackedBatch(names, 8.0, names, [0, 0], 1.0, videos=videos)
    assert extent(system, pack) == (2, 6, 12 + 6)
    pack.kept = [torch.arange(5), torch.arange(2)]
    assert extent(system, pack) == (2, 6, 7)


def test_tensorboard_shows_configuration_hyperparameters_and_commit(
    fit: Any, diffusion_model: dict, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--trainer.logger", "true", "--trainer.max_steps", "2", "--seed_everything", "7"]
    last = fit({"model": diffusion_model}, run_dir, *arguments)
    events = EventAccumulator(str(run_dir))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert "seed_everything: 7" in written
    assert "# commit: " in written
    assert "warmup_steps: 2" in written
    assert "pixels_per_batch: 5120" in written
    table = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.init_args.warmup_steps" in table
    assert b"commit" in table
    system = DiffusionSystem.from_checkpoint(last)
    counts = {name: events.Scalars(f"cost/{name}")[0].value for name in parameter_counts(system)}
    trained = sum(p.numel() for p in system.denoiser.parameters())
    assert counts["parameters/denoiser"] == trained
    assert counts["parameters/trained"] == trained + counts["parameters/conditioner"]
    parts = ("tokenizer", "denoiser", "conditioner")
    assert counts["parameters"] == sum(counts[f"parameters/{part}"] for part in parts)


def test_other_loggers_are_given_the_configuration(run_dir: Path) -> None:
    (first, *_) = sorted(run_dir.rglob("hparams.yaml"))
    values = yaml.safe_load(first.read_text())
    assert values["data"]["batching"]["sizes"] == ["5x16x16"]
    assert values["seed_everything"] == 0
    assert values["tokenizer"]["init_args"]["widths"] == [8, 16]
    assert {"commit", "version"} <= values.keys()
