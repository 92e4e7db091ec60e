"""A typed description of what a data module serves; systems check it in ``setup``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class DataSpec:
    """Frames per second, sizes, packing, and where clips, sources and latents come from.

    ``sizes`` is empty where clips keep their own. ``tokenizer_fingerprint`` is that of the
    tokenizer that made ``latents``; ``None`` while pixels are served.
    """

    fps: float
    validates: bool
    sizes: tuple[VideoSize, ...] = ()
    sources: bool = False
    packing: Packing | None = None
    latents: Path | None = None
    tokenizer_fingerprint: str | None = None
