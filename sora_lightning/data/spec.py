"""What a data module serves, typed: systems check it in ``setup``, before a step is taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sora_lightning.data.batching.native_sizes import Packing


@dataclass(frozen=True)
class DataSpec:
    """Frames per second, packing, and where clips, their sources and their latents come from.

    ``tokenizer_fingerprint`` is that of the tokenizer that made ``latents``; ``None`` while pixels
    are served.
    """

    fps: float
    validates: bool
    sources: bool = False
    packing: Packing | None = None
    latents: Path | None = None
    tokenizer_fingerprint: str | None = None
