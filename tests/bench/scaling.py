"""How time and memory of forward and backward passes grow with the work: with tokens, frames, clips
and ranks. The exponents are fitted; 1 is linear.

Memory is the most that tensors hold at one time. On ranks it is that of the first, with weights and
gradients; two ranks take half of the same clips each, with one thread as the one rank.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from sora_lightning.denoisers import DiT
from sora_lightning.layers.partitions import FactorisedSelfAttention, Joint
from sora_lightning.live_memory import LiveMemory, without_gradients
from sora_lightning.systems.parallel import shard_parameters
from tests.bench.models import CHANNELS, backward, condition, latents
from tests.bench.report import Report

NETWORK, WIDTH = "tiny", 128  # of the text
LAYOUTS = {"joint": Joint(), "factorised": FactorisedSelfAttention()}
# Clips, frames, rows and columns of latents by the size that grows. A patch is 2 x 2.
TOKENS = {frames * side**2 // 4: (1, frames, side) for frames, side in ((4, 16), (4, 32), (4, 64))}
FRAMES = {frames: (1, frames, 16) for frames in (8, 16, 32, 64)}
CLIPS = {clips: (clips, 4, 16) for clips in (1, 2, 4, 8, 16)}
OF_RANKS, RANKS, ROUNDS = (8, 4, 16), 2, 6

Extent = tuple[int, int, int]


def run(report: Report) -> None:
    for layout in LAYOUTS:
        grow(report, layout, "tokens", TOKENS)
        grow(report, layout, "frames", FRAMES)
    grow(report, "joint", "clips", CLIPS)
    ranks(report)


def grow(report: Report, layout: str, of: str, extents: Mapping[int, Extent]) -> None:
    """Fit the exponents of time and memory in the sizes, which are the keys of ``extents``."""
    model = _network(layout)
    steps = [_step(model, *extent) for extent in extents.values()]
    case = f"DiT-{NETWORK}/2, {layout}, forward and backward, more {of}"
    calls = {f"{size} {of}": step for size, step in zip(extents, steps, strict=True)}
    seconds = [row.median_s for row in report.compare(case, calls).values()]
    report.exponent(case, of, list(extents), seconds)
    with without_gradients(model):
        peaks = [_peak(step) for step in steps]
    report.exponent(case, of, list(extents), peaks, "memory")


def ranks(report: Report) -> None:
    """Compare one rank with two that share its clips, by DDP and with sharded parameters."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, port, ROUNDS, results)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a rank failed")
    times, peaks = results.get()
    clips, frames, side = OF_RANKS
    case = f"DiT-{NETWORK}/2, {clips} clips of {frames * side**2 // 4} tokens, forward and backward"
    report.measured(case, times)
    one, *several = times
    for name in several:
        seconds = [statistics.median(times[which]) for which in (one, name)]
        report.exponent(f"{case}, {name}", "ranks", [1, RANKS], seconds)
    for name in peaks.keys() - {one}:
        values = [peaks[one], peaks[name]]
        report.exponent(f"{case}, {name}", "ranks", [1, RANKS], values, "memory")


def _rank(rank: int, port: int, rounds: int, results: SimpleQueue) -> None:
    """Run the steps by turns; the first rank puts their seconds and peaks of memory."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=RANKS)
    clips, *extent = OF_RANKS
    kinds: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "1 rank": (partial(_network, "joint"), clips),
        f"{RANKS} ranks": (_replicated, clips // RANKS),
        f"{RANKS} ranks, sharded": (_sharded, clips // RANKS),
    }
    alone = {"1 rank"} if rank else set()  # what this rank leaves to the first
    steps = {
        name: (lambda: None) if name in alone else _step(make(), own, *extent)
        for name, (make, own) in kinds.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + rounds):
        for name, step in steps.items():
            dist.barrier()
            begun_s = time.perf_counter()
            step()
            dist.barrier()
            times[name].append(time.perf_counter() - begun_s)
    # FSDP frees storages that it keeps, which LiveMemory does not see.
    counted = [name for name in kinds if name not in alone and "sharded" not in name]
    peaks = {name: _peak(partial(_first_steps, *kinds[name], extent)) for name in counted}
    if rank == 0:
        results.put(({name: several[1:] for name, several in times.items()}, peaks))
    dist.destroy_process_group()


def _first_steps(make: Callable[[], nn.Module], clips: int, extent: Sequence[int]) -> None:
    step = _step(make(), clips, *extent)
    for _ in range(2):  # DDP arranges its buckets anew after the first
        step()


def _network(layout: str) -> nn.Module:
    return DiT(CHANNELS, WIDTH, NETWORK, layout=LAYOUTS[layout])


def _replicated() -> nn.Module:
    return DistributedDataParallel(_network("joint"))


def _sharded() -> nn.Module:
    model = _network("joint")
    shard_parameters([model], init_device_mesh("cpu", (RANKS,)))
    return model


def _step(model: nn.Module, clips: int, frames: int, side: int) -> Callable[[], object]:
    (x, t), cond = latents(clips, frames, side), condition(clips, WIDTH)
    return backward(model, partial(model, x, t, cond))


def _peak(step: Callable[[], object]) -> int:
    with LiveMemory() as memory:
        step()
    return memory.peak
