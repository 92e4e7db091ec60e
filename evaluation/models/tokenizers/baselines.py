"""Baselines for a tokenizer: bicubic scaling to as many values, and H.264 in as many bytes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import av
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

Video = UInt8[np.ndarray, "F H W 3"]
_PIXEL_FORMATS = ("yuv420p", "yuv444p")
_FINEST, _COARSEST, _NUM_TRIALS = 0.0, 51.0, 8
_SEI = 6  # type of a NAL unit with supplemental information, which decoding does not need


@dataclass(frozen=True)
class Rebuilt:
    """A clip after a baseline, its size (values or bytes), and the setting used."""

    video: Video
    size: int
    setting: str


def bicubic_in_space(video: Video, num_values: int) -> Rebuilt:
    """Scale every frame down and up again, with at most ``num_values`` values in between."""
    return _bicubic(video, num_values, len(video))


def bicubic_in_space_and_time(video: Video, num_values: int) -> Rebuilt:
    """Scale in space and time with at most ``num_values`` values in between.

    Every frame, every second, every fourth and so on are kept, down to one frame, which leaves more
    values for each. The variant with the smallest mean squared error is returned.
    """
    counts = {-(-len(video) // 2**halvings) for halvings in range(len(video).bit_length() + 1)}
    tried = [_bicubic(video, num_values, count) for count in sorted(counts)]
    return min(tried, key=lambda rebuilt: _squared_error(rebuilt.video, video))


def h264(video: Video, num_bytes: int, fps: float) -> Rebuilt:
    """Encode with x264 (preset veryslow) in at most ``num_bytes`` bytes, in 4:2:0 or 4:4:4.

    The better of both is returned. Parameter sets count towards the size, x264's SEI note does not.
    Raises ``ValueError`` if even the coarsest setting is larger.
    """
    fitting = [r for kind in _PIXEL_FORMATS if (r := _finest(video, num_bytes, fps, kind))]
    if not fitting:
        raise ValueError(f"{num_bytes} bytes are too few for H.264 of a clip of {video.shape}")
    return min(fitting, key=lambda rebuilt: _squared_error(rebuilt.video, video))


def _bicubic(video: Video, num_values: int, num_frames: int) -> Rebuilt:
    frames, height, width, _ = video.shape
    scale = min(1.0, (num_values / (3 * num_frames * height * width)) ** 0.5)
    h = max(1, round(height * scale)) if height != width else isqrt(num_values // (3 * num_frames))
    h = min(height, max(1, h))
    w = min(width, max(1, num_values // (3 * num_frames * h)))
    x = rearrange(torch.from_numpy(video).float(), "F H W c -> c F H W")
    small = _along_time(_in_space(x, h, w), num_frames)
    small = small.round().clamp(0, 255)  # 8 bits a value, as for latents
    large = _in_space(_along_time(small, frames), height, width)
    levels = rearrange(large.round().clamp(0, 255), "c F H W -> F H W c").to(torch.uint8)
    return Rebuilt(levels.numpy(), small.numel(), f"{num_frames}x{h}x{w}")


def _in_space(x: Float[Tensor, "c F H W"], h: int, w: int) -> Float[Tensor, "c F h w"]:
    if x.shape[2:] == (h, w):
        return x
    return functional.interpolate(x, (h, w), mode="bicubic", antialias=True)


def _along_time(x: Float[Tensor, "c F H W"], f: int) -> Float[Tensor, "c f H W"]:
    if x.shape[1] == f:
        return x
    height, width = x.shape[2:]
    lines = rearrange(x, "c F H W -> 1 c F (H W)")
    lines = functional.interpolate(lines, (f, height * width), mode="bicubic", antialias=True)
    return rearrange(lines, "1 c f (H W) -> c f H W", H=height)


def _finest(video: Video, num_bytes: int, fps: float, pixel_format: str) -> Rebuilt | None:
    """Find the best quality factor by bisection; the size decreases with it."""
    best, low, high = None, _FINEST, _COARSEST
    crf = high
    for _ in range(_NUM_TRIALS):
        packets = _encode(video, crf, fps, pixel_format)
        size = sum(map(len, packets))
        if size <= num_bytes:
            best, high = (packets, size, crf), crf
        else:
            low = crf
            if crf == _COARSEST:
                return None
        crf = (low + high) / 2
    assert best is not None
    packets, size, crf = best
    return Rebuilt(_decode(packets), size, f"{pixel_format}, crf {crf:.2f}")


def _encode(video: Video, crf: float, fps: float, pixel_format: str) -> list[bytes]:
    """The packets of a stream without a container."""
    codec = av.CodecContext.create("libx264", "w")
    codec.height, codec.width = video.shape[1:3]
    codec.pix_fmt = pixel_format
    codec.time_base = 1 / Fraction(fps).limit_denominator(1001)
    codec.framerate = 1 / codec.time_base
    codec.thread_count = 1
    codec.options = {"preset": "veryslow", "crf": str(crf), "g": str(len(video))}
    packets = []
    for number, frame in enumerate(video):
        image = av.VideoFrame.from_ndarray(frame, format="rgb24")
        image = image.reformat(format=pixel_format, interpolation="BICUBIC")
        image.pts = number
        image.time_base = codec.time_base
        packets += codec.encode(image)
    return [_without_notes(bytes(packet)) for packet in [*packets, *codec.encode(None)]]


def _without_notes(packet: bytes) -> bytes:
    """A packet in Annex B format without its SEI units."""
    units = packet.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    return b"".join(b"\0\0\1" + unit for unit in units if unit[0] & 31 != _SEI)


def _decode(packets: list[bytes]) -> Video:
    codec = av.CodecContext.create("h264", "r")
    codec.thread_count = 1
    frames = [frame for data in packets for frame in codec.decode(av.Packet(data))]
    frames += codec.decode(None)
    return np.stack(
        [f.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray() for f in frames]
    )


def _squared_error(video: Video, other: Video) -> float:
    return float(np.square(video.astype(np.float64) - other).mean())
