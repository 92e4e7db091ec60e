"""The interface of captioners that ``predict`` and its writer use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from sora_lightning.captioner.decoding import Decoding
from sora_lightning.captioner.video_encoder import Videos
from sora_lightning.configuration import KeepsArguments


class Captioner(KeepsArguments, nn.Module, ABC):
    """Writes captions of clips."""

    @abstractmethod
    def captions(
        self,
        videos: Videos,
        decoding: Decoding,
        rngs: Sequence[torch.Generator],
        num_captions: int = 1,
    ) -> list[list[str]]:
        """Return ``num_captions`` captions of each clip of pixels in [-1, 1].

        ``rngs`` has a generator for each clip, from which a decoding that draws draws all of them.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 of all that captions depend on, but the decoding."""
