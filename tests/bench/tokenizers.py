"""The demo's tokenizer, and one of full 3 x 3 x 3 convolutions beside diffusers' Wan class: encode
and decode, whole and piece by piece, and how time grows with frames.

The two classes differ in architecture: ``at equal work`` is their ratio at equal FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.tokenizers import ConvTokenizer
from tests.bench.models import forward
from tests.bench.report import Report

FRAMES, SIDE, BATCH = 65, 64, 4
PIECE = 16  # frames, of a video that streams
GROWING_FRAMES = (9, 17, 33, 65)
_DEMO_YAML = Path(__file__).parents[2] / "experiments" / "demo" / "tokenizer.yaml"
DEMO: dict[str, Any] = yaml.safe_load(_DEMO_YAML.read_text())["model"]["init_args"]["tokenizer"][
    "init_args"
]
DENSE: dict[str, Any] = {
    "latent_channels": 16,
    "widths": [64, 128, 256],
    "down_time": [True, True],
    "down_space": [True, True],
    "patch": 2,
}
WAN_WIDTH = 24  # of its first level: about as many FLOPs as DENSE


def run(report: Report) -> None:
    demo(report)
    _beside_wan(report)
    _streamed(report)
    _grow(report)


def demo(report: Report) -> None:
    """Measure the demo's tokenizer against the matrix product."""
    video, make = _video(BATCH, FRAMES), partial(ConvTokenizer, **DEMO)
    for what, call, work in _both(make(), video):
        report.compare(
            f"the demo's tokenizer, {BATCH} x {FRAMES}x{SIDE}x{SIDE}, {what}",
            {"sora_lightning": forward(call)},
            gmac={"sora_lightning": work},
            items=BATCH * FRAMES,
            unit="frames",
        )


def _beside_wan(report: Report) -> None:
    from diffusers import AutoencoderKLWan

    video = _video(1, FRAMES)
    ours = _both(ConvTokenizer(**DENSE), video)
    theirs = _both(AutoencoderKLWan(base_dim=WAN_WIDTH).eval(), video)
    for (what, our_call, our_work), (_, their_call, their_work) in zip(ours, theirs, strict=True):
        report.compare(
            f"a tokenizer of 3 x 3 x 3 convolutions, {FRAMES}x{SIDE}x{SIDE}, {what}",
            {"diffusers' Wan": forward(their_call), "sora_lightning": forward(our_call)},
            gmac={"diffusers' Wan": their_work, "sora_lightning": our_work},
            items=FRAMES,
            unit="frames",
        )


def _streamed(report: Report) -> None:
    tokenizer = ConvTokenizer(**DEMO).eval()
    pieces = _pieces(_video(BATCH, FRAMES))
    with torch.no_grad():
        latents = list(tokenizer.encode_pieces(pieces))
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode": (
            lambda: tokenizer.encode(torch.cat(pieces, 2)),
            lambda: list(tokenizer.encode_pieces(pieces)),
        ),
        "decode": (
            lambda: tokenizer.decode(torch.cat(latents, 2)),
            lambda: list(tokenizer.decode_pieces(latents)),
        ),
    }
    for what, (whole, streamed) in calls.items():
        report.compare(
            f"the demo's tokenizer, {BATCH} x {FRAMES}x{SIDE}x{SIDE} by {PIECE} frames, {what}",
            {"whole": forward(whole), "streamed": forward(streamed)},
            items=BATCH * FRAMES,
            unit="frames",
        )


def _grow(report: Report) -> None:
    tokenizer, times = ConvTokenizer(**DEMO).eval(), []
    case = f"the demo's tokenizer, {BATCH} clips of {SIDE}x{SIDE}, encode"
    calls = {
        f"{frames} frames": forward(partial(tokenizer.encode, _video(BATCH, frames)))
        for frames in GROWING_FRAMES
    }
    times = [row.median_s for row in report.compare(case, calls).values()]
    report.exponent(case, "frames", GROWING_FRAMES, times)


def _both(tokenizer: nn.Module, video: Tensor) -> list[tuple[str, Callable[[], Any], float]]:
    """Return encoding and decoding of ours or diffusers', with their billions of
    multiply-accumulates.
    """
    frames, side, channels = 4, 8, 16  # Wan's compression and latent channels
    if isinstance(tokenizer, ConvTokenizer):
        frames, side = tokenizer.compression.frames, tokenizer.compression.height
        channels = tokenizer.latent_channels
    extent = 1 + (video.shape[2] - 1) // frames, SIDE // side, SIDE // side
    latents = torch.randn(len(video), channels, *extent)
    calls = {
        "encode": partial(tokenizer.encode, video),
        "decode": partial(tokenizer.decode, latents),
    }
    return [(what, call, _gmac(call)) for what, call in calls.items()]


def _gmac(call: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def _video(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, 3, frames, SIDE, SIDE) * 2 - 1


def _pieces(video: Tensor) -> list[Tensor]:
    """Return the first frame and the first piece together, then the other pieces."""
    return [video[:, :, : 1 + PIECE], *video[:, :, 1 + PIECE :].split(PIECE, dim=2)]
