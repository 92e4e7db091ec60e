"""Check of clip sizes: a tokenizer and a denoiser's patches must divide them into whole tokens."""

from __future__ import annotations

from sora_lightning.layers.patch import Patch
from sora_lightning.types import Compression, VideoSize


def check_size(key: str, size: VideoSize, compression: Compression, patch: Patch | None) -> None:
    """Raise ``ValueError`` with ``key`` and the nearest sizes that fit if ``size`` does not.

    Args:
        compression: Pixels to a latent position.
        patch: Latent positions to a token; ``None`` where the latents are not cut further.
    """
    patch = patch or Patch()
    step = patch.compress(compression)
    # The first frame is a latent frame by itself, so f latent frames show 1 + (f - 1) *
    # compression.frames.
    frames = _around(size.num_frames, step.frames, step.frames - compression.frames + 1)
    heights, widths = _around(size.height, step.height), _around(size.width, step.width)
    given = {
        "num_frames": (size.num_frames, frames),
        "height": (size.height, heights),
        "width": (size.width, widths),
    }
    wrong = [name for name, (value, fitting) in given.items() if value not in fitting]
    if not wrong:
        return
    below = VideoSize(frames[0], heights[0], widths[0])
    above = VideoSize(frames[-1], heights[-1], widths[-1])
    nearest = str(below) if below == above else f"{below} or {above}"
    faults = " and ".join(f"{name} {given[name][0]}" for name in wrong)
    verb = "does" if len(wrong) == 1 else "do"
    raise ValueError(
        f"{key} = {str(size)!r}: {faults} {verb} not divide into tokens of {step.frames} frames x "
        f"{step.height} x {step.width} pixels (the first latent frame holds one frame). "
        f"The nearest that fit: {nearest}"
    )


def _around(value: int, step: int, start: int | None = None) -> list[int]:
    """Return the members of ``start, start + step, ...`` around ``value``, or ``value`` itself."""
    start = step if start is None else start
    if value < start:
        return [start]
    below = start + (value - start) // step * step
    return [below] if below == value else [below, below + step]
