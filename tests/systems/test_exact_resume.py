"""A training that is stopped anywhere and resumed ends as one that was never stopped."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from sora_lightning.cli.errors import Terminated
from sora_lightning.trust import trust_only_known_packages
from tests.systems.test_adversarial_training import ADVERSARIAL
from tests.systems.test_captioner import MODEL as CAPTIONER
from tests.systems.test_captioner import PACKING as CAPTIONER_PACKING
from tests.systems.test_packed_training import PACKED

STEPS = 5
STOPS = ("fetched", "backward", "stepped")


class Stop(Callback):
    """Stops this process as Ctrl-C or SIGTERM does: between fetching a batch and its step, after
    the batch's backward pass, or after the step."""

    def __init__(self, batch: int, where: str, number: int) -> None:
        self.batch, self.where, self.number = batch, where, number
        self.seen = 0

    def _reach(self, where: str) -> None:
        if (self.seen, where) == (self.batch, self.where):
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._reach("fetched")

    def on_after_backward(self, trainer: Trainer, *args: Any) -> None:
        self._reach("backward")

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._reach("stepped")
        self.seen += 1


@pytest.fixture(scope="module")
def configurations(
    tokenizer_model: dict[str, Any], diffusion_model: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    adversarial = {**tokenizer_model["init_args"], "adversarial": ADVERSARIAL}
    return {
        "tokenizer": {"model": {**tokenizer_model, "init_args": adversarial}},
        "captioner": {"model": CAPTIONER},
        "captioner, packed": {"model": CAPTIONER, "data": CAPTIONER_PACKING},
        "diffusion": {"model": diffusion_model},
        "diffusion, packed": {"model": diffusion_model, "data": PACKED},
    }


@pytest.fixture(scope="module")
def whole(
    fit: Callable[..., Path],
    configurations: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, Any]]:
    """Return the last checkpoint of a training that is not stopped; each is trained once."""

    @functools.cache
    def train(name: str, *flags: str) -> dict[str, Any]:
        path = fit(configurations[name], tmp_path_factory.mktemp("whole") / "run", *flags)
        return torch.load(path, weights_only=True)

    return train


def _flags(workers: int, accumulate: int, precision: str) -> tuple[str, ...]:
    return (
        f"--trainer.max_steps={STEPS}",
        f"--data.reading.num_workers={workers}",
        f"--trainer.accumulate_grad_batches={accumulate}",
        f"--trainer.precision={precision}",
    )


def _texts_and_tensors(state: dict[str, Any]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    texts = {name: value for name, value in state.items() if isinstance(value, str)}
    return texts, {name: value for name, value in state.items() if name not in texts}


def check(
    fit: Callable[..., Path],
    configuration: dict[str, Any],
    expected: dict[str, Any],
    run: Path,
    flags: tuple[str, ...],
    stop: Stop,
) -> None:
    trust_only_known_packages(__name__)
    shutil.rmtree(run, ignore_errors=True)
    arguments = {"batch": stop.batch, "where": stop.where, "number": stop.number}
    part = {"class_path": f"{__name__}.Stop", "init_args": arguments}
    with suppress(KeyboardInterrupt, Terminated):
        fit(configuration, run, *flags, f"--trainer.callbacks+={json.dumps(part)}")
    resume = ["--ckpt_path=last"] if (run / "checkpoints" / "last.ckpt").exists() else []
    found = torch.load(fit(configuration, run, *flags, *resume), weights_only=True)
    pairs = [_texts_and_tensors(one["state_dict"]) for one in (found, expected)]
    texts, weights = zip(*pairs, strict=True)
    assert texts[0] == texts[1]  # a captioner's vocabulary
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    for key in ("optimizer_states", "global_step"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    averages = (one["callbacks"]["ema"]["weights"] for one in (found, expected))
    torch.testing.assert_close(*averages, rtol=0, atol=0)


@pytest.mark.parametrize(
    "where", ["fetched", *(pytest.param(one, marks=pytest.mark.slow) for one in STOPS[1:])]
)
def test_ctrl_c_anywhere_in_a_step_of_several_batches_loses_nothing(
    where: str,
    fit: Callable[..., Path],
    configurations: dict[str, dict[str, Any]],
    whole: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    flags = _flags(0, 2, "32-true")
    stop = Stop(3, where, signal.SIGINT)  # the second batch of the second step
    check(fit, configurations["diffusion"], whole("diffusion", *flags), tmp_path, flags, stop)


@pytest.mark.slow
@given(
    name=st.sampled_from(
        ["tokenizer", "captioner", "captioner, packed", "diffusion", "diffusion, packed"]
    ),
    workers=st.sampled_from([0, 2]),
    accumulate=st.sampled_from([1, 2]),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
    batch=st.integers(0, STEPS - 1),
    where=st.sampled_from(STOPS),
    number=st.sampled_from([signal.SIGINT, signal.SIGTERM]),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_training_stopped_anywhere_ends_as_if_it_had_not_been(
    fit: Callable[..., Path],
    configurations: dict[str, dict[str, Any]],
    whole: Callable[..., dict[str, Any]],
    tmp_path: Path,
    name: str,
    workers: int,
    accumulate: int,
    precision: str,
    batch: int,
    where: str,
    number: int,
) -> None:
    flags = _flags(workers, accumulate, precision)
    expected = whole(name, *_flags(0, accumulate, precision))
    check(fit, configurations[name], expected, tmp_path, flags, Stop(batch, where, number))
