"""Reads chosen frames by torchcodec, and by PyAV what torchcodec refuses or misplaces."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import PyAVReader, Reader
from sora_lightning.data.decoding.timeline import Timeline

log = logging.getLogger(__name__)


class TorchCodecReader(Reader):
    """Reads by torchcodec, and by PyAV if torchcodec cannot open the file or its frames differ in
    number or time from the packets.

    torchcodec returns each frame's time, so no check of the packets is needed in advance: a frame
    of another time is discarded. Only ``SubprocessReader`` notices damage, as with decord. Raises
    ``ValueError`` if torchcodec or the FFmpeg it needs is not installed.
    """

    def __init__(self) -> None:
        require_torchcodec()

    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        if timeline.pyav_only is None:
            try:
                return self._read(path, timeline, list(indices))
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                log.debug("%s: read by PyAV, as torchcodec fails: %s", path, error)
        return PyAVReader().read(path, timeline, indices)

    @staticmethod
    def _read(path: Path, timeline: Timeline, indices: list[int]) -> np.ndarray:
        decoder = _opened(path)
        if len(decoder) != len(timeline):
            raise DecodeError(f"{len(decoder)} frames, where the packets say {len(timeline)}")
        batch = decoder.get_frames_at(indices)
        expected = timeline.pts[indices] * timeline.tick_s
        if np.abs(batch.pts_seconds.numpy() - expected).max() > timeline.tick_s / 2:
            raise DecodeError("frames of other times than those asked for")
        return batch.data.numpy()


def _opened(path: Path) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(
        path.absolute(), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )


def require_torchcodec() -> None:
    """Raise ``ValueError`` where torchcodec is not installed, or does not load."""
    if importlib.util.find_spec("torchcodec") is None:
        raise ValueError("torchcodec is not installed: pip install 'sora-lightning[torchcodec]'")
    # FFmpeg paints over damage and says so on stderr alone, which torchcodec keeps quiet unless
    # asked when it is loaded; SubprocessReader listens.
    os.environ.setdefault("TORCHCODEC_FFMPEG_LOG_LEVEL", "WARNING")
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torchcodec is installed and does not load ({reason}): it needs the shared libraries "
            "of FFmpeg 4 to 8, and a version built for this torch"
        ) from error
