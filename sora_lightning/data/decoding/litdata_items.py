"""Clips in litdata datasets: a row's ``litdata`` names the folder or address of one, ``item`` the
index in it. litdata fetches only the bytes of that item; order and resuming are those of any other
manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_lightning.checks import import_optional

# Under this key an item that is a mapping holds its video file.
VIDEO = "video"
# Formats that hold values and no objects.
PLAIN = {"str", "text", "bool", "int", "float", "bytes", "json"}


class LitDataItems:
    """Reads items of datasets, each of which is opened once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Any] = {}

    def content(self, dataset: str, number: int) -> bytes:
        """Return the video file that an item is, or holds under ``video``. Raises ``ValueError`` if
        it cannot be fetched or is no video.
        """
        if dataset not in self._datasets:
            self._datasets[dataset] = _opened(dataset)
        try:
            item = self._datasets[dataset][number]
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{dataset}: item {number} cannot be read: {error}") from error
        content = item.get(VIDEO) if isinstance(item, Mapping) else item
        if not isinstance(content, bytes | memoryview):
            raise ValueError(
                f"{dataset}: item {number}: must be the bytes of a video file, or a dict that has "
                f"them under {VIDEO!r}"
            )
        return bytes(content)


class Unread:
    """In place of one of litdata's serializers: the value is ``None``. That of ``pickle`` would run
    what a dataset says, and others decode what is not asked for.
    """

    def setup(self, data_format: str) -> None:
        pass

    def deserialize(self, data: Any) -> None:
        return None


def _opened(dataset: str) -> Any:
    """Open a dataset. Raises ``ValueError`` for one whose index names files elsewhere."""
    litdata = require_litdata()
    formats = set(litdata.streaming.serializers._SERIALIZERS) - PLAIN
    opened = litdata.StreamingDataset(dataset, serializers={name: Unread() for name in formats})
    for name in opened.subsampled_files:
        if Path(name).name != name:
            raise ValueError(f"{dataset}: its index.json names {name!r}, which is no file in it")
    return opened


def require_litdata() -> Any:
    """Return the module litdata. Raises ``ValueError`` if it is not installed or does not load."""
    try:
        return import_optional("litdata", "a clip in a litdata dataset", "litdata")
    except RuntimeError as error:  # torchvision's, where it was built for another torch
        raise ValueError(f"litdata is installed and does not load: {error}") from error
