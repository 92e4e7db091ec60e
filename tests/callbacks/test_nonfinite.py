"""A step whose loss or gradients are not finite changes nothing; too many in a row end the
training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from sora_lightning.callbacks import EMA, RunCheckpoint, SkipNonFinite
from sora_lightning.callbacks.checkpoint import NonFiniteError
from tests.ranks import Pair


class Spoiled(BoringModel):
    """Its loss in some batches, its gradients or a weight are not finite."""

    def __init__(
        self, losses: set[int], gradient: int = -1, weight: int = -1, rank: int = 0
    ) -> None:
        super().__init__()
        self.losses, self.gradient, self.weight, self.rank = losses, gradient, weight, rank

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.weight:
            self.layer.bias.data[0] = math.inf
        loss = self.layer(batch).square().mean()
        if batch_idx in self.losses and self.global_rank == self.rank:
            return loss * math.nan
        if batch_idx == self.gradient:
            return loss + (self.layer.bias.detach() - self.layer.bias).sum().abs().sqrt()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


class Record(Callback):
    """Keeps the weights, the optimizer's state and the averages after each batch."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        optimizer = trainer.optimizers[0].state_dict()["state"]
        parts = pl_module.state_dict(), optimizer, self.ema.weights
        self.states.append(torch.utils._pytree.tree_map(lambda x: x.clone(), parts))


def _fit(folder: Path, model: Spoiled, skip: SkipNonFinite, **settings: Any) -> Record:
    ema = EMA(decay=0.5)
    record = Record(ema)
    torch.manual_seed(0)
    model.layer.reset_parameters()
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[ema, record, skip, RunCheckpoint(folder, 2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=0,
        **{"devices": 1, "max_steps": 8, **settings},
    )
    trainer.fit(model)
    return record


@pytest.mark.parametrize(
    ("spoiled", "what"),
    [
        (Spoiled({3}), "the loss is nan"),
        (Spoiled(set(), gradient=3), "the gradients are not finite"),
    ],
)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer_nor_averages(
    tmp_path: Path, spoiled: Spoiled, what: str
) -> None:
    skip = SkipNonFinite()
    with pytest.warns(
        UserWarning, match=rf"{what} at step 3: the step is skipped\. Skipped in a row: 1 "
    ):
        record = _fit(tmp_path, spoiled, skip)
    torch.testing.assert_close(record.states[3], record.states[2], rtol=0, atol=0)
    for part in range(3):  # the next step goes on
        with pytest.raises(AssertionError):
            torch.testing.assert_close(record.states[4][part], record.states[3][part])
    assert skip.num_skipped == 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["SkipNonFinite"] == {"num_skipped": 1}
    assert saved["global_step"] == 8


def test_all_batches_of_an_accumulated_step_are_skipped_with_it(tmp_path: Path) -> None:
    record = _fit(tmp_path, Spoiled({2}), SkipNonFinite(), accumulate_grad_batches=2, max_steps=4)
    for batch in (2, 3, 4):  # the average is not updated in the middle of the next step either
        torch.testing.assert_close(record.states[batch], record.states[1], rtol=0, atol=0)
    assert not torch.equal(record.states[5][0]["layer.bias"], record.states[1][0]["layer.bias"])


def test_no_state_is_saved_after_a_skipped_step(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"the loss is nan at step 5\. .*last\.ckpt is the last"
    ):
        _fit(tmp_path, Spoiled({5}), SkipNonFinite(0))
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 4


def test_more_in_a_row_than_allowed_end_the_training_with_all_of_them_named(
    tmp_path: Path,
) -> None:
    said = "at step 3; the loss is nan at step 4; the loss is nan at step 5; .* at step 6. .*last"
    with pytest.raises(NonFiniteError, match=said):
        _fit(tmp_path, Spoiled({3, 4, 5, 6}), SkipNonFinite())
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 2
    _fit(tmp_path / "apart", Spoiled({1, 3, 4, 5, 7}), SkipNonFinite())


def test_weights_that_are_not_finite_end_the_training_at_once(tmp_path: Path) -> None:
    said = r"at step 3; layer\.bias is not finite, so that no step can follow\. .*last\.ckpt is"
    with pytest.raises(NonFiniteError, match=said):
        _fit(tmp_path, Spoiled(set(), weight=3), SkipNonFinite())
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 2


def test_the_clips_of_a_loss_that_is_not_finite_are_named(tmp_path: Path) -> None:
    skip, model = SkipNonFinite(0), Spoiled(set())
    trainer = Trainer(logger=False, callbacks=[skip, RunCheckpoint(tmp_path)])
    skip.on_train_batch_start(trainer, model, SimpleNamespace(clip_ids=["a", "b"]), 0)
    skip.on_before_backward(trainer, model, torch.tensor(math.inf))
    with pytest.raises(NonFiniteError, match=r"inf at step 0 on the clips a, b\. Nothing"):
        skip.on_before_optimizer_step(trainer, model, model.configure_optimizers())


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nonfinite\.max_in_a_row = -1: must not be negative"):
        SkipNonFinite(-1)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop(patience_s=10)


def _rank(folder: Path) -> None:
    torch.manual_seed(0)
    settings = {"num_nodes": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "max_steps": 4}
    record = _fit(folder, Spoiled({2}, rank=1), SkipNonFinite(), **settings)
    torch.save(record.states, folder / f"{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    pair: Pair, tmp_path: Path
) -> None:
    pair.run(_rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(one[3], one[1], rtol=0, atol=0)
    assert not torch.equal(one[5][0]["layer.bias"], one[1][0]["layer.bias"])
