"""Ends a training in which a rank stands still, and says which one and on what."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from threading import Event, Thread
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from sora_lightning.checks import require_positive
from sora_lightning.data.batching.sampler import StreamLoader


class Watchdog(Callback):
    """Ends the training on all ranks where a batch takes longer than ``timeout_s``.

    A message names the rank that is behind, the number of its batch since the first, and that
    batch's files and sizes. Ranks tell each other where they are through the process group's store,
    so that one that no longer runs is found as well; on the same machine it is killed. Exit code 1;
    the last checkpoint stays. Validations are not watched.

    Args:
        timeout_s: Seconds from one batch to the next, or within one, with saving and compiling.
            The message comes at most 8 tenths of it, and 40 s, later. NCCL ends a process after
            600 s without naming data.
    """

    def __init__(self, timeout_s: float = 540.0) -> None:
        require_positive("watchdog.", timeout_s=timeout_s)
        self.timeout_s = timeout_s
        self._watch: _Watch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch = _Watch(trainer, self.timeout_s)
        self._watch.start()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        assert self._watch is not None
        self._watch.note(trainer.fit_loop.total_batch_idx, is_loaded=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        assert self._watch is not None
        self._watch.note(trainer.fit_loop.total_batch_idx + 1, is_loaded=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.since_s = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.note(trainer.fit_loop.total_batch_idx + 1, is_loaded=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.ended.set()
            self._watch = None


class _Note(NamedTuple):
    """Progress of a rank: waiting for a batch or in it, and its position in the plan, or -1."""

    batch: int
    is_loaded: int
    position: int

    @classmethod
    def parse(cls, text: bytes) -> _Note:
        return cls(*map(int, text.split()))


class _Watch(Thread):
    """Looks at the time, tells the other ranks that this one runs, and ends the process."""

    def __init__(self, trainer: Trainer, timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.loader = trainer.train_dataloader
        self.rank, self.num_ranks = trainer.global_rank, trainer.world_size
        self.timeout_s, self.poll_s = timeout_s, min(timeout_s / 10, 5.0)
        self.ended = Event()
        self.beats = itertools.count()
        self.stopped: list[int] = []
        self.since_s: float | None = None  # not watched
        self.store = _store(self.num_ranks)
        self.store.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        # Read now: the store may lie in the process that stops.
        self.processes = [self.store.get(f"process/{i}").decode() for i in range(self.num_ranks)]
        self._beat()
        self.note(trainer.fit_loop.total_batch_idx + 1, is_loaded=False)

    def note(self, batch: int, is_loaded: bool) -> None:
        """Note progress. Batches are counted from 0."""
        position = -1
        if isinstance(self.loader, StreamLoader):
            stream = self.loader.sampler
            position = stream.position + stream.rank - is_loaded * stream.num_replicas
        self.last = _Note(batch, int(is_loaded), position)
        self.since_s = time.monotonic()
        self.store.set(f"note/{self.rank}", " ".join(map(str, self.last)))

    def run(self) -> None:
        with suppress(dist.DistError):  # the store's process has ended, and with it the training
            while not self.ended.wait(self.poll_s):
                self._beat()
                since_s = self.since_s
                if since_s is not None and time.monotonic() - since_s > self.timeout_s:
                    self._end()

    def _beat(self) -> None:
        self.store.set(f"beat/{self.rank}", str(next(self.beats)))

    def _end(self) -> None:
        """Say what stands still, unless another rank does, and end this process."""
        report = Thread(target=self._report, daemon=True)
        report.start()
        report.join(7 * self.poll_s)
        if report.is_alive():  # no call to a store has a timeout of its own
            self.stopped = [0]
            self._say("rank 0, which keeps what the ranks note, does not answer")
        host = socket.gethostname()
        for rank in self.stopped:
            of_rank, pid = self.processes[rank].rsplit(" ", 1)
            if of_rank == host:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
        for child in multiprocessing.active_children():  # a worker that hangs outlives its parent
            child.kill()
        os._exit(1)

    def _report(self) -> None:
        with suppress(dist.DistError):
            self.store.set(f"said/{self.rank}", self._place(self.rank, self.last, self._activity()))
            if self.store.add("claims", 1) == 1:
                self.stopped = self._without_beat()
                self._say("; ".join(self._places()))
                return
            for _ in range(8):  # until the rank that was first has said it
                self._beat()
                time.sleep(self.poll_s / 2)

    def _say(self, places: str) -> None:
        print(
            f"\nsora-lightning fit: no progress for watchdog.timeout_s = {self.timeout_s:g} s: "
            f"{places}. The training ends; the last checkpoint stays",
            file=sys.stderr,
            flush=True,
        )

    def _without_beat(self) -> list[int]:
        """Return the ranks whose watch does not run any more."""
        ranks = range(self.num_ranks)
        before = [self.store.get(f"beat/{rank}") for rank in ranks]
        time.sleep(3 * self.poll_s)
        self._beat()
        return [rank for rank in ranks if self.store.get(f"beat/{rank}") == before[rank]]

    def _places(self) -> list[str]:
        """Return where the ranks are that no longer run; if all do, those furthest behind."""
        notes = [_Note.parse(self.store.get(f"note/{rank}")) for rank in range(self.num_ranks)]
        if self.stopped:
            return [self._place(i, notes[i], "no longer runs, since") for i in self.stopped]
        behind = [rank for rank, note in enumerate(notes) if note[:2] == min(notes)[:2]]
        said = {rank: f"said/{rank}" for rank in behind}
        return [
            self.store.get(key).decode()
            if self.store.check([key])
            else self._place(rank, notes[rank], "is at")
            for rank, key in said.items()
        ]

    def _activity(self) -> str:
        if self.last.is_loaded:
            return "works on"
        is_waiting = not isinstance(self.loader, StreamLoader) or self.loader.is_waiting
        return "waits for the data of" if is_waiting else "is before"

    def _place(self, rank: int, note: _Note, activity: str) -> str:
        clips = ""
        if isinstance(self.loader, StreamLoader):
            clips = f" ({', '.join(self.loader.named(note.position))})"
        return f"rank {rank} {activity} batch {note.batch}{clips}"


def _store(num_ranks: int) -> dist.Store:
    if num_ranks == 1:
        return dist.HashStore()
    # The only way to a group's store. A clone has a connection and a lock of its own.
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return dist.PrefixStore("watchdog", store)
