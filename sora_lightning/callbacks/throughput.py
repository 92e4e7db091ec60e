"""Logs what a training has seen, how fast it is, and what a step costs.

Lightning's ``ThroughputMonitor`` takes all batches for one size, counts on the first rank alone and
forgets its counts when a run is resumed; its ``LearningRateMonitor`` needs a logger and names a
curve after the optimizer's class.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from sora_lightning.data import VideoDataModule
from sora_lightning.data.ranks import data_ranks
from sora_lightning.flops import FlopCounter
from sora_lightning.layers.patch import Patch
from sora_lightning.systems import CaptionerSystem, DiffusionSystem, TokenizerSystem
from sora_lightning.systems.optimizers.parameters import has_gradients
from sora_lightning.types import Compression, PackedBatch, TokenGrid, VideoBatch, VideoSize

_MUCH_WAITING = 0.25


class Extent(NamedTuple):
    """Counts of a batch. Frames are those of the videos, also for cached latents."""

    clips: int = 0
    frames: int = 0
    tokens: int = 0


class Throughput(Callback):
    """Logs, with ``trainer.log_every_n_steps``:

    - ``progress/clips``, ``progress/frames``, ``progress/tokens``: seen since the first step, by
      all ranks; a resumed run goes on counting. Tokens are what the denoiser, or the captioner's
      encoder, attends to, without dropped ones; for a tokenizer, latent positions.
    - ``progress/flops``: spent since the first step, by all ranks.
    - ``cost/flops_per_step``: FLOPs of an optimizer step's forward and backward passes, all ranks.
    - ``cost/parameters``, ``cost/parameters/trained`` and ``cost/parameters/<part>``: numbers of
      parameters, once, at the first step.
    - ``throughput/clips_per_s``, ``throughput/tokens_per_s``: all ranks, without validations.
    - ``throughput/step_s``: seconds of an optimizer step, without validations.
    - ``throughput/waiting_s``: of these, seconds in which the first rank waited for data.
    - ``throughput/waiting``: the same as a share of the step; also in the progress bar. Past a
      quarter, a run warns once, of the file that took longest to decode so far.
    - ``optimizer/learning_rate``: that of the first group of parameters.
    - ``optimizer/gradient_norm``: the 2-norm of all gradients before they are clipped.
    - ``memory/peak_gib``: the most memory that the first rank has held so far, in GiB: on CUDA of
      the device, else of the process.

    The throughput is the mean of the steps since it was logged before; the first step, which
    compiles and allocates, does not count. Steps that ``SkipNonFinite`` skips count nowhere. FLOPs
    are counted by ``FlopCounter`` on the first batch of each shape, and on the first pack of clips;
    what follows in that shape is taken to cost the same. What a fused attention computes a second
    time in its backward pass is not counted, so that a number does not depend on the device.
    """

    def __init__(self) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64)  # clips, frames, tokens, flops
        self._trained = self._totals.clone()  # the same, of whole steps that were not skipped
        self._step = 0
        self._flops: dict[str, int] = {}  # of a batch, by its shape
        self._counting = ExitStack()
        self._counter: FlopCounter | None = None
        self._logged: _Moment | None = None
        self._slowest: tuple[str, float] | None = None
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self._trained.tolist(), "flops": self._flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals = torch.tensor(state_dict["totals"], dtype=torch.float64)
        self._flops = dict(state_dict.get("flops", {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = None
        if trainer.world_size > 1:
            self._totals = self._totals.to(trainer.strategy.root_device)
        self._trained, self._step = self._totals.clone(), trainer.global_step
        counts = {
            f"cost/{name}": float(count) for name, count in parameter_counts(pl_module).items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if _shape(batch) not in self._flops:
            self._counter = self._counting.enter_context(FlopCounter())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._counting.close()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        every = _every_n_steps(trainer)
        if not every or (trainer.global_step + 1) % every:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        pl_module.log("optimizer/gradient_norm", getattr(norm, "full_tensor", lambda: norm)())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch | PackedBatch,
        batch_idx: int,
    ) -> None:
        self._counting.close()
        if self._counter is not None and len(batch):  # of a pack, no clip may have been readable
            self._flops[_shape(batch)] = self._counter.total
        self._counter = None
        alike = trainer.world_size / data_ranks(trainer)[1]  # ranks that read this batch
        seen = [count / alike for count in extent(pl_module, batch)]
        counts = [*seen, self._flops.get(_shape(batch), 0)]
        own = torch.tensor(counts, dtype=torch.float64, device=self._totals.device)
        self._totals += trainer.strategy.reduce(own, reduce_op="sum")
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if has_gradients(trainer.optimizers):
                self._trained = self._totals.clone()
            else:  # the step was skipped
                self._totals = self._trained.clone()
        self._slowest = max(self._slowest, batch.slowest, key=lambda one: one[1] if one else 0.0)
        now = _Moment(trainer.global_step, time.perf_counter(), _waited_s(trainer), self._totals)
        if self._logged is None:
            self._logged = now.frozen()
        every, stepped = _every_n_steps(trainer), now.step > self._logged.step
        if every and stepped and now.step % every == 0:
            self._log(trainer, pl_module, self._logged, now)
            self._logged = now.frozen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start_s = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._logged is not None:
            spent_s = time.perf_counter() - self._validation_start_s
            self._logged = self._logged._replace(time_s=self._logged.time_s + spent_s)

    def _log(
        self, trainer: Trainer, system: LightningModule, before: _Moment, now: _Moment
    ) -> None:
        names = ("clips", "frames", "tokens", "flops")
        steps, seconds = now.step - before.step, now.time_s - before.time_s
        clips, _, tokens, flops = (now.totals - before.totals).tolist()
        values = dict(zip((f"progress/{name}" for name in names), now.totals.tolist(), strict=True))
        values |= {
            "cost/flops_per_step": flops / steps,
            "throughput/clips_per_s": clips / seconds,
            "throughput/tokens_per_s": tokens / seconds,
            "throughput/step_s": seconds / steps,
            "throughput/waiting_s": (now.waited_s - before.waited_s) / steps,
            "optimizer/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "memory/peak_gib": peak_memory_gib(system.device),
        }
        system.log_dict({name: torch.tensor(value) for name, value in values.items()})
        waiting = (now.waited_s - before.waited_s) / seconds
        system.log("throughput/waiting", waiting, prog_bar=True)
        if waiting > _MUCH_WAITING and self._slowest is not None and not self._warned:
            self._warned = True
            rank_zero_warn(_slow_data(trainer, waiting, *self._slowest))


def _slow_data(trainer: Trainer, waiting: float, path: str, decode_s: float) -> str:
    """Return what a training that waits for data says: the slowest file, and the remedies."""
    said = f"the training waits for data in {waiting:.0%} of its time. Slowest to decode: {path}, "
    said += f"{decode_s:.1f} s a clip"
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, VideoDataModule):
        return said
    copies = data.manifest.parent / "small"
    command = f"sora-lightning index --source {data.manifest} --reencode-to {copies} "
    command += f"--output {copies / data.manifest.with_suffix('.jsonl').name}"
    # Copies of that shorter side cover every size on both sides.
    if sides := [max(size.height, size.width) for size in data.sizes.sizes]:
        command += f" --short-side {max(sides)}"
    workers = data.reading.num_workers
    return f"{said}. `{command}` makes copies that decode fast, for data.manifest; " + (
        f"more data.reading.num_workers than {workers} decode ahead where there are cores"
    )


class _Moment(NamedTuple):
    """A step, its time, and what had been seen and waited for by then."""

    step: int
    time_s: float
    waited_s: float
    totals: Tensor

    def frozen(self) -> _Moment:
        return self._replace(totals=self.totals.clone())


def extent(system: LightningModule, batch: VideoBatch | PackedBatch) -> Extent:
    """Count the clips, frames and tokens of a batch. For a system of another package, tokens are
    not known and 0.
    """
    if isinstance(system, DiffusionSystem):
        compression, patch = system.tokenizer.compression, system.denoiser.patch
    elif isinstance(system, TokenizerSystem):
        compression, patch = system.tokenizer.compression, Patch()
    elif isinstance(system, CaptionerSystem):
        compression, patch = system.captioner.encoder.compression, Patch()
    else:
        return Extent(len(batch))
    sizes, grids = _sizes(batch, compression)
    tokens = sum(patch.grid(grid.f, grid.h, grid.w).num_tokens for grid in grids)
    if isinstance(batch, PackedBatch) and batch.kept is not None:
        tokens = sum(map(len, batch.kept))
    return Extent(len(batch), sum(size.num_frames for size in sizes), tokens)


def _sizes(
    batch: VideoBatch | PackedBatch, compression: Compression
) -> tuple[list[VideoSize], list[TokenGrid]]:
    """Return the size in pixels, and the extent of the latents, of each clip."""
    videos = batch.videos if isinstance(batch, PackedBatch) else batch.video
    if videos is not None:
        sizes = [VideoSize(*video.shape[1:]) for video in videos]
        return sizes, [compression.grid(size) for size in sizes]
    assert batch.latents is not None
    grids = [TokenGrid(*latents.shape[1:]) for latents in batch.latents]
    return [compression.size(grid) for grid in grids], grids


def parameter_counts(system: nn.Module) -> dict[str, int]:
    """Count parameters: all, those that train, and those of each part; a shared one counts once."""
    total = list(system.parameters())
    counts = {
        "parameters": sum(p.numel() for p in total),
        "parameters/trained": sum(p.numel() for p in total if p.requires_grad),
    }
    for name, part in system.named_children():
        if count := sum(p.numel() for p in part.parameters()):
            counts[f"parameters/{name}"] = count
    return counts


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: of a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _shape(batch: VideoBatch | PackedBatch) -> str:
    """Return what decides the FLOPs of a batch; one key for all packs, which share one budget."""
    if isinstance(batch, PackedBatch):
        return "pack"
    tensor = batch.video if batch.latents is None else batch.latents
    assert tensor is not None
    return "x".join(map(str, tensor.shape))


def _waited_s(trainer: Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited_s", 0.0)


def _every_n_steps(trainer: Trainer) -> int:
    return trainer.log_every_n_steps  # type: ignore[attr-defined]
