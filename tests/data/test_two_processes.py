"""Two real processes (gloo) share what one would see, packed and dense, from a folder and from
shards; stopped anywhere, they go on, as many or fewer; their gradient is that of one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from sora_lightning.data import Packing, read_manifest, write_shards
from sora_lightning.systems.batches import mean_over_ranks
from sora_lightning.types import PackedBatch, VideoBatch
from tests.data.modules import data_module
from tests.data.test_datamodule import trainer
from tests.ranks import Pair

pytestmark = pytest.mark.slow

DENSE = {"sizes": ["9x16x16", "9x12x20"], "pixels_per_batch": 4 * 9 * 16 * 16}
PACKED = {"packing": Packing(30, "4x4x4", 17, 32 * 40, (1, 4, 4))}


class Detections(L.LightningModule):
    """Writes what each rank is fed, and steps by a loss whose gradient is the clips' mean pixel."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.folder = folder
        self.fed: list[tuple[list[str], list[str], list[float]]] = []
        self.gradients: list[list[float]] = []

    def training_step(self, batch: VideoBatch | PackedBatch, batch_idx: int) -> Tensor:
        videos = batch.videos if isinstance(batch, PackedBatch) else list(batch.pixels)
        sums = [float(video.double().sum()) for video in videos or []]
        self.fed.append((batch.clip_ids, batch.captions, sums))
        means = [video.mean((1, 2, 3)) for video in videos or []]
        losses = torch.stack(means) @ self.weight if means else self.weight[:0]
        return mean_over_ranks(self, losses)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.weight.grad is not None
        self.gradients.append(self.weight.grad.tolist())

    def on_train_end(self) -> None:
        said = {"fed": self.fed, "gradients": self.gradients}
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(said))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    manifest: Path, settings: dict, folder: Path, steps: int, workers: int, resume: Path | None
) -> None:
    """One process of a run; how many there are stands where torchrun says it."""
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, "last", every_n_train_steps=1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    one = trainer(
        folder, max_steps=steps, callbacks=[saving], enable_checkpointing=True,
        devices=1, num_nodes=world_size, strategy="ddp" if world_size > 1 else "auto",
    )  # fmt: skip
    data = data_module(manifest, **settings, num_workers=workers, run_length=2, steps_per_epoch=3)
    one.fit(Detections(folder), data, ckpt_path=resume)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop(patience_s=10)


def run(
    ranks: Pair | None, manifest: Path, settings: dict, folder: Path, steps: int,
    workers: int = 0, resume: Path | None = None,
) -> tuple[list, list]:  # fmt: skip
    """Return the clips that two ranks, or one in this process, saw, in the order of one; and
    rank 0's gradients."""
    folder.mkdir(exist_ok=True)
    arguments = (manifest, settings, folder, steps, workers, resume)
    train(*arguments) if ranks is None else ranks.run(train, *arguments)
    names = [f"rank{rank}.json" for rank in range(1 if ranks is None else 2)]
    said = [json.loads((folder / name).read_text()) for name in names]
    steps_of = zip(*(one["fed"] for one in said), strict=True)
    return [batch for step in steps_of for batch in step], said[0]["gradients"]


@pytest.fixture(scope="module")
def sharded(shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(shapes["train"], tmp_path_factory.mktemp("shards"), 40_000)


@pytest.mark.parametrize("settings", [DENSE, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("streamed", [False, True], ids=["folder", "shards"])
def test_two_processes_are_one_and_go_on_as_one_or_two(
    settings: dict,
    streamed: bool,
    pair: Pair,
    sharded: Path,
    shapes: dict[str, Path],
    tmp_path: Path,
) -> None:
    """(ranks, workers): (2, 2) goes on as (2, 0) in the middle and (1, 2) at an epoch's end, and
    (1, 0) as (2, 2)."""
    manifest = sharded if streamed else shapes["train"]
    alone, gradients = run(None, manifest, settings, tmp_path / "alone", 9)
    two = tmp_path / "two"
    together, shared = run(pair, manifest, settings, two, 2, workers=2)
    assert together == alone[:4]
    if settings is PACKED:  # two packs of clips as one: each clip of both weighs alike
        counts = torch.tensor([float(len(batch[0])) for batch in alone[:4]]).view(2, 2)
        single = torch.tensor(gradients[:4]).view(2, 2, 3)
        mean = (single * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        torch.testing.assert_close(torch.tensor(shared), mean, atol=1e-5, rtol=1e-5)
    middle, _ = run(pair, manifest, settings, two, 3, workers=0, resume=two / "last.ckpt")
    assert middle == alone[4:6]
    rest, _ = run(None, manifest, settings, two, 6, workers=2, resume=two / "last.ckpt")
    assert rest == alone[6:9]
    first = tmp_path / "first"
    begun, _ = run(None, manifest, settings, first, 4)
    assert begun == alone[:4]
    grown, _ = run(pair, manifest, settings, first, 6, workers=2, resume=first / "last.ckpt")
    assert grown == alone[4:8]


def test_two_processes_leave_no_clip_out_of_a_pass_of_packs(
    pair: Pair, shapes: dict[str, Path], tmp_path: Path
) -> None:
    data = data_module(shapes["train"], **PACKED, run_length=2)
    data.setup("fit")
    steps = len(data.train_dataloader()) // 2
    together, _ = run(pair, shapes["train"], PACKED, tmp_path / "pass", steps)
    seen = Counter(name for batch in together for name in batch[0])
    assert seen == Counter(record.clip_id for record in read_manifest(shapes["train"]))
