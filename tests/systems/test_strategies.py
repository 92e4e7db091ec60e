"""FSDP2, tensor and context parallelism and DDP on two processes (gloo) train as one process does;
each goes on from the others' checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from sora_lightning.callbacks import EMA, Throughput
from sora_lightning.callbacks.checkpoint import RunCheckpoint
from sora_lightning.captioner import VideoEncoder
from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.conditioning import TextConditioner
from sora_lightning.data import Packing, write_dataset
from sora_lightning.denoisers import DiT
from sora_lightning.layers.partitions import FactorisedSelfAttention
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.alignment import RepresentationAlignment
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.systems.optimizers import MuonAdamW, OptimizerFactory
from sora_lightning.systems.parallel import ShardedStrategy, whole
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import PackedBatch
from tests.data.modules import data_module
from tests.ranks import Pair

pytestmark = pytest.mark.slow

DENSE = {"sizes": ["5x16x16", "5x24x16"], "pixels_per_batch": 2 * 5 * 16 * 16}
PACKED = {"packing": Packing(40, "2x8x8", 5, 24 * 24, (1, 1, 1))}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STRATEGIES = {"fsdp2": partial(ShardedStrategy), "tensor": partial(ShardedStrategy, 2)}
STRATEGIES["context"] = partial(ShardedStrategy, context_parallel_size=2)
STRATEGIES |= {
    f"{name} by parts": partial(make, save_shards=True) for name, make in STRATEGIES.items()
}


def strategy_of(name: str) -> Strategy | str:
    return STRATEGIES[name]() if name in STRATEGIES else name


# A large eps, or the sign of a gradient that is nearly 0 would decide a step.
ADAMW = partial(torch.optim.AdamW, lr=1e-3, eps=1e-3)


class Deserted(DiffusionSystem):
    """None of the second rank's clips can be read."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            batch = PackedBatch([], 8.0, [], [], fill=0.0, videos=[])
        return super().training_step(batch, batch_idx)


def diffusion_system(
    optimizer: OptimizerFactory = ADAMW, kind: type[DiffusionSystem] = DiffusionSystem
) -> DiffusionSystem:
    torch.manual_seed(0)
    system = kind(
        ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1),
        TextConditioner(width=16, depth=1, num_heads=2),
        partial(DiT, size=TransformerSize(2, 24, 2), patch=(1, 1, 1)),
        drop_condition=0.5,
        optimizer=optimizer,
        warmup_steps=4,
    )
    return with_random_gates(system)


def with_random_gates(system: DiffusionSystem) -> DiffusionSystem:
    for parameter in system.parameters():  # gates of zero would hide half of the gradients
        parameter.data.normal_(std=0.1)
    return system


class Record(L.Callback):
    """Keeps losses of batches, gradients of the first step and the last validation; ends the
    training after ``stop`` steps."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.losses: list[float] = []
        self.validation: dict[str, float] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        trainer.should_stop = trainer.global_step == self.stop

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = module.named_parameters()
            self.gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}


def train(
    manifests: dict[str, Path], settings: dict[str, Any], folder: Path, strategy: str, steps: int,
    accumulate: int, make_system: Callable[[], DiffusionSystem] = diffusion_system,
) -> None:  # fmt: skip
    """One process of a run, which goes on from ``folder`` where it holds a checkpoint."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    record, checkpoint, throughput = Record(steps), RunCheckpoint(folder), Throughput()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, num_nodes=num_ranks, strategy=strategy_of(strategy),
        max_steps=12, accumulate_grad_batches=accumulate, gradient_clip_val=0.5,
        callbacks=[EMA(decay=0.8), record, checkpoint, throughput], logger=False,
        default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=100, use_distributed_sampler=False,
        limit_val_batches=4 if accumulate == 2 else 2,
    )  # fmt: skip
    data = data_module(
        manifests["train"], **settings, val_manifest=manifests["val"], run_length=4,
        steps_per_epoch=40 * accumulate,
    )  # fmt: skip
    system = make_system()
    trainer.fit(system, data, ckpt_path=checkpoint.last if checkpoint.last.exists() else None)
    record.validation = trainer.validate(system, data, verbose=False)[0]
    kept = {k: getattr(record, k) for k in ("losses", "gradients", "validation")}
    kept["seen"] = throughput.state_dict()["totals"][:3]  # clips, frames, tokens
    torch.save(kept, folder / f"{strategy}-{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop(patience_s=10)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return write_dataset(folder, num_train=24, num_val=8, num_test=0, num_workers=1)


def run(ranks: Pair | None, folder: Path, strategy: str, *rest: Any) -> list[dict[str, Any]]:
    """Return the records of each rank."""
    folder.mkdir(exist_ok=True)
    arguments = (rest[0], rest[1], folder, strategy, *rest[2:])
    train(*arguments) if ranks is None else ranks.run(train, *arguments)
    names = [f"{strategy}-{rank}.pt" for rank in range(1 if ranks is None else 2)]
    return [torch.load(folder / name) for name in names]


def test_a_dense_training_moves_between_strategies_and_stays_the_same(
    pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    """Losses, gradients, weights, averages and validations equal those of one process that
    accumulates two batches; every checkpoint is one file that the next strategy resumes."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    (one,) = run(None, alone, "auto", manifests, DENSE, 12, 2)
    ways = [("fsdp2", 1), ("tensor", 2), ("ddp", 1), ("context", 2), ("auto", 2), ("fsdp2", 1)]
    for number, (strategy, accumulate) in enumerate(ways):
        ranks = None if strategy == "auto" else pair
        two = run(ranks, moved, strategy, manifests, DENSE, 2 * number + 2, accumulate)
        expected = one["losses"][4 * number : 4 * number + 4]
        share = len(two) if accumulate == 1 else 1
        for rank, record in enumerate(two):
            wanted = expected[rank::share] if accumulate == 1 else expected
            torch.testing.assert_close(record["losses"], wanted, **CLOSE)
            assert record["gradients"].keys() == one["gradients"].keys()
            if number == 0:
                torch.testing.assert_close(record["gradients"], one["gradients"], **CLOSE)
    torch.testing.assert_close(two[0]["validation"], one["validation"], **CLOSE)
    for use_ema in (True, False):
        first, second = (
            dict(DiffusionSystem.from_checkpoint(folder / "last.ckpt", use_ema).named_parameters())
            for folder in (alone, moved)
        )
        torch.testing.assert_close(second, first, **CLOSE)


@pytest.mark.parametrize("strategy", ["fsdp2", "tensor", "context"])
def test_a_packed_step_has_the_loss_and_gradients_of_its_clips(
    strategy: str, pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    records = run(pair, tmp_path, strategy, manifests, PACKED, 1, 1)
    data = data_module(manifests["train"], **PACKED, run_length=4, steps_per_epoch=40)
    data.setup("fit")
    system, packs = diffusion_system().train(), iter(data.train_dataloader())
    shown = [next(packs) for _ in range(2 if strategy == "fsdp2" else 1)]
    losses = [system.losses(one, GroupDraws.of_clips(one, 0, system.device)) for one in shown]
    torch.cat(losses).mean().backward()
    expected = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    mean_clips = sum(map(len, losses)) / len(losses)
    for rank, record in enumerate(records):
        own = losses[rank] if strategy == "fsdp2" else losses[0]
        torch.testing.assert_close(record["losses"], [own.sum().item() / mean_clips], **CLOSE)
        assert record["gradients"].keys() == expected.keys()
        torch.testing.assert_close(record["gradients"], expected, **CLOSE)


@pytest.mark.parametrize("strategy", ["fsdp2", "tensor", "context"])
def test_muon_steps_as_on_one_process(
    strategy: str, pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    """Muon's update depends on a whole matrix, and the later losses on the updates."""
    muon = partial(diffusion_system, partial(MuonAdamW, lr=1e-2, eps=1e-3))
    (one,) = run(None, tmp_path / "one", "auto", manifests, DENSE, 3, 2, muon)
    accumulate = 1 if strategy == "fsdp2" else 2
    records = run(pair, tmp_path / "two", strategy, manifests, DENSE, 3, accumulate, muon)
    for rank, record in enumerate(records):
        share = slice(rank, None, 2) if strategy == "fsdp2" else slice(None)
        torch.testing.assert_close(record["losses"], one["losses"][share], **CLOSE)
        torch.testing.assert_close(record["validation"], one["validation"], **CLOSE)


def test_ranks_that_write_their_parts_hand_on_to_any_others(
    pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    """The file holds none of the weights, and every reader finds them beside it; parts that no
    checkpoint names are removed."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    (one,) = run(None, alone, "auto", manifests, DENSE, 8, 2)
    ways = [("fsdp2 by parts", 1), ("tensor by parts", 2), ("context by parts", 2), ("auto", 2)]
    (moved / "killed-0.shards").mkdir(parents=True)
    for number, (strategy, accumulate) in enumerate(ways):
        ranks = None if strategy == "auto" else pair
        two = run(ranks, moved, strategy, manifests, DENSE, 2 * number + 2, accumulate)
        expected = one["losses"][4 * number : 4 * number + 4]
        for rank, record in enumerate(two):
            wanted = expected[rank::2] if accumulate == 1 else expected
            torch.testing.assert_close(record["losses"], wanted, **CLOSE)
        if strategy == "auto":
            break
        parts = [len(list(one.glob("*.safetensors"))) for one in moved.glob("*.shards")]
        assert parts == [2] * min(number + 1, 2)  # of the last checkpoint and the one before
        content = read_checkpoint(moved / "last.ckpt")
        held = torch.load(moved / "last.ckpt", weights_only=True)
        sharded = "denoiser.blocks.0.mlp.0.weight"  # by every strategy
        assert held["state_dict"][sharded] is None
        assert isinstance(content["state_dict"][sharded], Tensor)
    first, second = (read_checkpoint(folder / "last.ckpt") for folder in (alone, moved))
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(second[part], first[part], **CLOSE)
    averages = [content["callbacks"]["ema"] for content in (first, second)]
    torch.testing.assert_close(averages[1], averages[0], **CLOSE)


def factorised_system() -> DiffusionSystem:
    """Blocks with two attentions each, whose activations are computed a second time."""
    torch.manual_seed(0)
    layout = FactorisedSelfAttention()
    size, recompute = TransformerSize(2, 24, 2), {"activation_checkpointing": True}
    denoiser = partial(DiT, size=size, patch=(1, 1, 1), layout=layout, **recompute)
    return with_random_gates(
        DiffusionSystem(
            ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1),
            TextConditioner(width=16, depth=1, num_heads=2),
            denoiser,
            drop_condition=0.5,
            optimizer=ADAMW,
            warmup_steps=4,
        )
    )


def aligned_system() -> DiffusionSystem:
    """Inner tokens are aligned with those of a video encoder (REPA)."""
    torch.manual_seed(0)
    encoder = VideoEncoder(TransformerSize(1, 24, 2), tubelet=(2, 8, 8))
    system = DiffusionSystem(
        ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1),
        TextConditioner(width=16, depth=1, num_heads=2),
        partial(DiT, size=TransformerSize(2, 24, 2), patch=(1, 1, 1)),
        drop_condition=0.5,
        alignment=RepresentationAlignment(encoder, block=1, hidden_width=32),
        optimizer=ADAMW,
        warmup_steps=4,
    )
    return with_random_gates(system)


@pytest.mark.parametrize(
    ("strategy", "data"),
    [
        *[(name, {"sizes": ["5x24x24"]}) for name in ("ddp", "fsdp2", "tensor", "context")],
        ("context", PACKED),
    ],
)
def test_tokens_are_aligned_as_on_one_process(
    strategy: str, data: dict[str, Any], pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    """The 27 tokens of a clip are aligned as a whole where ranks have 14 and 13 of them; a word
    that one rank has read counts as seen."""
    each = strategy in ("ddp", "fsdp2")  # reads other clips
    data = data if data is PACKED else {**data, "pixels_per_batch": 5 * 24 * 24}
    (one,) = run(None, tmp_path / "one", "auto", manifests, data, 2, 2, aligned_system)
    make = partial(run, pair, tmp_path / "two", strategy, manifests, data, 2)
    assert any(name.startswith("alignment.projector") for name in one["gradients"])
    for rank, record in enumerate(make(1 if each else 2, aligned_system)):
        losses = one["losses"][rank::2] if each else one["losses"]
        torch.testing.assert_close(record["losses"], losses, **CLOSE)
        torch.testing.assert_close(record["gradients"], one["gradients"], **CLOSE)
        torch.testing.assert_close(record["validation"], one["validation"], **CLOSE)
    first, second = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    torch.testing.assert_close(second["state_dict"], first["state_dict"], **CLOSE)


def test_parts_of_the_tokens_train_as_all_of_them(
    pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    """Clips of 27 and 12 tokens, of which a rank has 14 or 13, or 6: stopped and resumed, the
    training has the losses, gradients, averages and validation of one process."""
    odd = {"sizes": ["5x24x24", "5x16x16"], "pixels_per_batch": 5 * 24 * 24}
    (one,) = run(None, tmp_path / "one", "auto", manifests, odd, 4, 1, factorised_system)
    whole_losses: list[list[float]] = [[], []]
    for stop in (2, 4):
        records = run(pair, tmp_path / "two", "context", manifests, odd, stop, 1, factorised_system)
        for losses, record in zip(whole_losses, records, strict=True):
            losses += record["losses"]
            if stop == 2:
                torch.testing.assert_close(record["gradients"], one["gradients"], **CLOSE)
    for losses, record in zip(whole_losses, records, strict=True):
        torch.testing.assert_close(losses, one["losses"], **CLOSE)
        torch.testing.assert_close(record["validation"], one["validation"], **CLOSE)
        assert record["seen"] == one["seen"]
    first, second = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(second[part], first[part], **CLOSE)
    averages = [content["callbacks"]["ema"]["weights"] for content in (first, second)]
    torch.testing.assert_close(averages[1], averages[0], **CLOSE)


def test_a_rank_without_clips_does_not_count_where_parameters_are_sharded(
    pair: Pair, manifests: dict[str, Path], tmp_path: Path
) -> None:
    deserted = partial(diffusion_system, kind=Deserted)
    records = run(pair, tmp_path, "fsdp2", manifests, PACKED, 1, 1, deserted)
    data = data_module(manifests["train"], **PACKED, run_length=4, steps_per_epoch=40)
    data.setup("fit")
    system, pack = diffusion_system().train(), next(iter(data.train_dataloader()))
    losses = system.losses(pack, GroupDraws.of_clips(pack, 0, system.device))
    losses.mean().backward()
    expected = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    for rank, record in enumerate(records):
        loss = [2 * losses.mean().item(), 0.0][rank]  # whose mean over ranks is the clips' mean
        torch.testing.assert_close(record["losses"], [loss], **CLOSE)
        torch.testing.assert_close(record["gradients"], expected, **CLOSE)
