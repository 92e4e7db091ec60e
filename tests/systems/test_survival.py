"""A training that is stopped, or finds its files damaged, loses nothing and says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from sora_lightning.__main__ import main

Fit = Callable[..., int]


class Kill(Callback):
    """Sends this process a signal after a step, or in the validation after it."""

    def __init__(self, step: int, number: int, validating: bool = False) -> None:
        self.step, self.number, self.validating = step, number, validating

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step and not self.validating:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step and self.validating:
            os.kill(os.getpid(), self.number)


class Poison(Callback):
    """Makes a weight infinite, as an overflow does."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == 3:
            next(pl_module.parameters()).data.fill_(torch.inf)


class SpoilLoss(Callback):
    """Makes the loss of the third step NaN."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.global_step == 2:
            loss.data.fill_(torch.nan)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def fit_in(clips: dict[str, Path], tokenizer_model: Any) -> Fit:
    """Run ``fit`` in a folder by the program's own ``main``, and return its exit code."""

    loss = {"class_path": "sora_lightning.tokenizers.ReconstructionLoss", "init_args": {"kl": 0.01}}
    model = tokenizer_model | {"init_args": tokenizer_model["init_args"] | {"loss": loss}}

    def run(
        folder: Path, *arguments: str, callbacks: list[Any] | None = None, max_steps: int = 6
    ) -> int:
        config = {
            "run_dir": str(folder / "run"),
            "data": {
                "manifest": str(clips["train"]),
                "val_manifest": str(clips["val"]),
                "fps": 8,
                "batching": {
                    "sizes": ["5x16x16"],
                    "pixels_per_batch": 2 * 5 * 16 * 16,
                    "steps_per_epoch": 4,
                },
            },
            "trainer": {
                "logger": False,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accelerator": "cpu",
                "max_steps": max_steps,
                "callbacks": callbacks or [],
            },
            "checkpoint": {"every_n_steps": 2},
            "model": model,
        }
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(config))
        return main(["fit", "--config", str(path), *arguments, "--trust", __name__])

    return run


@pytest.fixture
def fit(fit_in: Fit, tmp_path: Path) -> Fit:
    return partial(fit_in, tmp_path)


def _part(kind: type, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"{__name__}.{kind.__name__}", "init_args": init_args}


def _step(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("name", "validating"),
    [
        ("SIGTERM", False),
        ("SIGHUP", True),
        pytest.param("SIGTERM", True, marks=pytest.mark.slow),
        pytest.param("SIGHUP", False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_newest_state_and_says_how_to_resume(
    fit: Fit,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    name: str,
    validating: bool,
) -> None:
    # A suite that runs below nohup starts with SIGHUP ignored, and a training then leaves it so.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    step = 4 if validating else 3
    kill = _part(Kill, step=step, number=int(signal.Signals[name]), validating=validating)
    assert fit(callbacks=[kill]) == 143
    assert _step(run_dir / "checkpoints" / "last.ckpt") == step
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"after step {step}: the same command with --ckpt_path last resumes from it" in said
    assert fit("--ckpt_path", "last") == 0
    assert _step(run_dir / "checkpoints" / "last.ckpt") == 6


def test_weights_that_overflow_end_the_training_and_leave_the_finite_checkpoint(
    fit: Fit, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(callbacks=[_part(Poison)]) == 1
    assert _step(run_dir / "checkpoints" / "last.ckpt") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "at step 3 on the clips" in said
    assert "last.ckpt is the last finite state" in said


def test_a_step_that_is_skipped_counts_nowhere(fit: Fit, run_dir: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"nan at step 2 on the clips .*\.mp4, .*\.mp4: the step is"
    ):
        assert fit(callbacks=[_part(SpoilLoss)], max_steps=4) == 0
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    clips, frames, _, flops = content["callbacks"]["Throughput"]["totals"]
    assert (clips, frames, flops % 3) == (3 * 2, 3 * 2 * 5, 0)
    assert content["callbacks"]["SkipNonFinite"] == {"num_skipped": 1}


def test_a_learning_rate_far_too_high_ends_the_training_with_a_sentence(
    fit: Fit, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = "--model.init_args.optimizer.init_args.lr=1e30"
    assert fit(rate, "--model.init_args.warmup_steps=1") == 1
    assert "the loss is nan at step 1 on the clips" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def finished(fit_in: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert fit_in(folder, max_steps=5) == 0
    return folder / "run"


@pytest.fixture
def trained(finished: Path, run_dir: Path) -> Path:
    """The checkpoints of a training of five steps, in a folder of the test's own."""
    shutil.copytree(finished, run_dir)
    return run_dir / "checkpoints"


def _damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    with ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda one: one.file_size)
    flipped[largest.header_offset + largest.file_size // 2 + 200] ^= 64  # within its weights
    content = {"truncated": whole[:20000], "empty": b"", "text": b"no checkpoint"}
    path.write_bytes((content | {"flipped": flipped})[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    fit: Fit, trained: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    assert [_step(trained / f"{name}.ckpt") for name in ("previous", "last")] == [4, 5]
    _damage(trained / "last.ckpt", how)
    assert fit("--ckpt_path", "last", max_steps=7) == 0
    assert f"Goes on from {trained / 'previous.ckpt'} (step 4)" in caplog.text
    assert [_step(trained / f"{name}.ckpt") for name in ("previous", "last")] == [6, 7]


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped"])
def test_without_another_checkpoint_a_damaged_one_is_refused_in_a_sentence(
    fit: Fit, trained: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (trained / "previous.ckpt").unlink()
    _damage(trained / "last.ckpt", how)
    assert fit("--ckpt_path", "last", max_steps=7) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "ckpt_path = 'last': " in said
    assert "last.ckpt cannot be read as a checkpoint" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokenizer.init_args.widths=[16,32]", "widths = [16, 32]: .* trained with [8, 16]"),
        ("optimizer.init_args.lr=0.5", "lr = 0.5: .* trained with 0.003"),
        ("optimizer=torch.optim.AdamW", "optimizer.class_path = 'torch.optim.AdamW': "),
        ("whiten=true", "whiten = True: "),
        ("loss.kl=0.5", "kl = 0.5: .* trained with 0.01"),
    ],
)
def test_a_resume_with_another_model_or_optimizer_is_refused(
    fit: Fit, trained: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir()}
    assert fit("--ckpt_path", "last", f"--model.init_args.{change}", max_steps=7) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for part in said.split(".*"):
        assert part.strip() in message
    assert "checkpoint.start_from" in message
    assert before == {path: path.read_bytes() for path in trained.iterdir()}


def test_a_resume_that_is_refused_changes_no_file(
    fit: Fit, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.read_bytes() for path in trained.parent.rglob("*") if path.is_file()}
    for change in ("batching.pixels_per_batch=7680", "fps=4"):
        assert fit("--ckpt_path", "last", f"--data.{change}", max_steps=9) == 2
    assert "data.fps = 4.0: the checkpoint was trained with 8.0" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in trained.parent.rglob("*") if path.is_file()}
    assert fit("--ckpt_path", "last", max_steps=7) == 0


def test_a_second_training_in_the_same_folder_is_refused(
    fit: Fit, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir.mkdir()
    code = "import fcntl, sys; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "print('locked', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=run_dir, stdin=pipe, stdout=pipe, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert fit() == 2
        other.communicate("")
    assert "another training writes into it" in capsys.readouterr().err.splitlines()[-1]
    assert fit(max_steps=1) == 0


_FINDER = "[{class_path: lightning.pytorch.callbacks.LearningRateFinder}]"
_SHARDED = "sora_lightning.systems.parallel.ShardedStrategy"
_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [
        ("accelerator=nonsense", 2, "invalid accelerator name"),
        ("devices=0", 2, "`Trainer(devices='0')` value is not a valid input"),
        ("strategy=nonsense", 2, "invalid strategy name"),
        ("max_time=2 hours", 2, "is not a valid duration"),
        ("limit_train_batches=1.5", 2, "invalid value 1.5 for limit_train_batches"),
        ("accumulate_grad_batches=0", 2, "trainer.accumulate_grad_batches = 0: must be at least 1"),
        # Gradients would be scaled by a negative number: the training would climb.
        ("gradient_clip_val=-1", 2, "trainer.gradient_clip_val = -1: must not be negative"),
        ("overfit_batches=1", 2, "trainer.overfit_batches = 1: the data module plans"),
        (f"callbacks={_FINDER}", 2, "compare several by `sora-lightning ablate`"),
        (f"strategy={_SHARDED}", 2, "a TokenizerSystem does not share its layers out; take ddp"),
        ("strategy=fsdp", 2, "give sora_lightning.systems.parallel.ShardedStrategy"),
        (
            "callbacks=[{class_path: EMA, init_args: {decay: 2.0}}]",
            2,
            "callbacks[0].init_args.decay = 2.0",
        ),
        ("callbacks=[{class_path: EMA}, {class_path: EMA}]", 2, "every run has Throughput, and"),
        (
            f"callbacks=[{{class_path: {_STOPPING}, init_args: {{monitor: nothing}}}}]",
            1,
            "conditioned on metric `nothing`",
        ),
    ],
)
def test_what_the_trainer_refuses_is_one_line(
    fit: Fit, capsys: pytest.CaptureFixture[str], argument: str, code: int, said: str
) -> None:
    argument = argument.replace("EMA", "sora_lightning.callbacks.EMA")
    every = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=2")
    assert fit(f"--trainer.{argument}", *every) == code
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    below, folder = tmp_path / "file" / "x.safetensors", tmp_path / "x.safetensors"
    folder.mkdir()
    (tmp_path / "weights.pt").write_text("")
    files = ["--source=dit", "--target=sora-lightning", f"--input={tmp_path / 'weights.pt'}"]
    for output, said in (
        (below, "file: cannot be written to: Not a directory"),
        (folder, "is a folder"),
    ):
        assert main(["convert", *files, f"--output={output}"]) == 2
        assert said in capsys.readouterr().err
    picture = str(tmp_path / "file" / "x.png")
    assert main(["curves", "--folder", str(tmp_path), "--output", picture]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_seed_out_of_range_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--seed_everything=-1") == 2
    assert "seed_everything: -1 is not in bounds" in capsys.readouterr().err


def test_a_yaml_in_another_encoding_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.yaml").write_bytes("run_dir: grün".encode("latin-1"))
    assert main(["fit", "--config", str(tmp_path / "latin.yaml")]) == 2
    assert "latin.yaml: is not text in UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="sets aside root's rights")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    # Imported as root: the clone may lie in a folder that no one else may read.
    code = (
        "import os; from sora_lightning.files import *; os.setgroups([]); os.setgid(65534); "
        f"os.setuid(65534); check_writable(Path({str(tmp_path / 'new')!r}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert f"ValueError: {tmp_path / 'new'}: cannot be written to: Perm" in ended.stderr
