"""The most memory that passes of a DiT take, each in a process of its own, over the planner's
estimate: resident, with what the allocator keeps, and of tensors that are alive at one time.
"""

from __future__ import annotations

import multiprocessing
import re
import warnings
from functools import partial
from pathlib import Path

import torch

from sora_lightning.cli.training_cost import condition_of_zeros, on_meta
from sora_lightning.conditioning import Unconditional
from sora_lightning.denoisers import DiT
from sora_lightning.live_memory import LiveMemory, without_gradients
from sora_lightning.planner.counting import count
from sora_lightning.systems import DiffusionSystem
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import VideoSize
from tests.bench.report import Report
from tests.bench.tokenizers import DEMO

SIZE, CLIPS, NETWORK = "65x128x128", 2, "S"
MIB = 2**20
PROCESS = Path("/proc/self")  # Linux tells here what a process holds


def run(report: Report) -> None:
    if not PROCESS.exists():
        print("  no resident memory: it is read from Linux's /proc")
        return
    with on_meta():
        counted = count(_system(False), VideoSize.parse(SIZE), torch.float32)
    estimates = {
        "forward": counted.working_set,
        "forward and backward": counted.activations,
        "forward and backward, activation checkpointing": counted.checkpointed,
    }
    spawn = multiprocessing.get_context("spawn")
    for what, of_clip in estimates.items():
        with spawn.Pool(1) as child:
            peaks = child.apply(peak_bytes, (what, CLIPS))
        case = f"DiT-{NETWORK}/2, {CLIPS} clips of {counted.tokens} tokens, {what}"
        report.quantity(case, "planner's estimate", CLIPS * of_clip / MIB, "MiB")
        for name, peak in zip(("resident", "tensors"), peaks, strict=True):
            of_estimate = 100 * peak / (CLIPS * of_clip)
            report.quantity(case, f"{name}, of the estimate", of_estimate, "%")


def _system(checkpointing: bool) -> DiffusionSystem:
    make = partial(DiT, size=NETWORK, activation_checkpointing=checkpointing)
    return DiffusionSystem(ConvTokenizer(**DEMO), Unconditional(), make)


def peak_bytes(what: str, clips: int) -> tuple[float, float]:
    """Return by how much a pass of ``clips`` raises this process's resident memory at its most, and
    the most that the tensors of a second pass hold.
    """
    warnings.filterwarnings("ignore", ".*saved during checkpointing.*")
    system = _system(checkpointing="checkpointing" in what)
    denoiser, grid = system.denoiser, system.tokenizer.compression.grid(VideoSize.parse(SIZE))

    def step(clips: int, *extent: int) -> None:
        x_t = torch.zeros(clips, system.tokenizer.latent_channels, *extent)
        with torch.set_grad_enabled("backward" in what), without_gradients(denoiser):
            y = denoiser(x_t, torch.zeros(clips), condition_of_zeros(system, clips))
            if y.requires_grad:
                y.sum().backward()

    step(1, 1, 4, 4)  # sets the kernels up
    (PROCESS / "clear_refs").write_text("5")  # forgets the most that was held so far
    held = _resident_bytes("VmRSS")
    step(clips, grid.f, grid.h, grid.w)
    resident = _resident_bytes("VmHWM") - held
    with LiveMemory() as memory:
        step(clips, grid.f, grid.h, grid.w)
    return resident, float(memory.peak)


def _resident_bytes(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024.0 * int(found[1])
