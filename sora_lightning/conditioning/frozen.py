"""Text encoders that do not train, and a cache of what they return."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner, without_dropped
from sora_lightning.conditioning.known_fingerprints import KnownFingerprint
from sora_lightning.files import save_tensors
from sora_lightning.types import Condition


class FrozenTextEncoder(Conditioner):
    """A text encoder that does not train; its weights stay in the files that they came from.

    The network is no submodule, so that checkpoints, optimizers and averages hold nothing of it. A
    checkpoint holds ``fingerprint``, a SHA-256 that differs where the embeddings do; loading one
    that was made with another encoder raises ``ValueError``. The condition of no caption is that
    of the empty one.

    ``load`` returns the network; it is called when the first caption is encoded. ``known`` is where
    the fingerprint is kept once embeddings are.
    """

    digest: Tensor
    padded = False  # True where the tokens of padding are meant to be read

    def __init__(
        self,
        load: Callable[[], nn.Module],
        width: int,
        fingerprint: str,
        known: KnownFingerprint | None = None,
    ):
        super().__init__(width)
        self.fingerprint = fingerprint
        self.known = known
        self._load = load
        self._network: tuple[Any, ...] = ()
        digest = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
        self.register_buffer("digest", digest)

    @property
    def network(self) -> Any:
        """Return the network, on the device of this module."""
        if not self._network:
            self._network = (self._load().eval().requires_grad_(False),)
        return self._network[0].to(self.digest.device)

    @abstractmethod
    def encode(self, captions: list[str]) -> Condition:
        """Return the condition of each caption. Padding of a batch must not change it."""

    @torch.no_grad()
    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        with torch.autocast(self.digest.device.type, enabled=False):
            return _float(self.encode(without_dropped(captions, drop)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}digest")
        if saved is not None and bytes(saved.tolist()).hex() != self.fingerprint:
            raise ValueError(
                f"the weights were trained with the text encoder {bytes(saved.tolist()).hex()[:12]}"
                f", and {self} is {self.fingerprint[:12]}: give the folder of that encoder"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class CachedText(Conditioner):
    """Keeps the embeddings of a frozen encoder on disk, so that it runs once for each caption.

    ``folder`` has a file for each caption, named by the caption's SHA-256, in a folder named by the
    encoder's fingerprint. Files appear whole: any number of processes may share the folder. Outside
    of training nothing is written where the folder does not exist, and a prompt is encoded. If the
    folder has all captions and the encoder's fingerprint is known, its weights are not read.
    """

    def __init__(self, encoder: FrozenTextEncoder, folder: Path):
        super().__init__(encoder.width)
        self.pooled_width = encoder.pooled_width
        self.encoder = encoder
        self.folder = Path(folder) / encoder.fingerprint[:16]

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        texts = without_dropped(captions, drop)
        found = self._embeddings(texts, write=self.training or self.folder.is_dir())
        return _float(_batch([found[text] for text in texts], self.encoder.digest.device))

    def keep(self, captions: list[str]) -> None:
        """Write the embeddings of these captions and of the empty one, where they are missing."""
        self._embeddings(["", *captions], write=True)

    def _embeddings(self, texts: list[str], write: bool) -> dict[str, dict[str, Tensor]]:
        read = {text: self._read(text) for text in dict.fromkeys(texts)}
        found = {text: one for text, one in read.items() if one is not None}
        if missing := [text for text in read if text not in found]:
            with torch.no_grad(), torch.autocast(self.encoder.digest.device.type, enabled=False):
                encoded = self.encoder.encode(missing)
            for index, text in enumerate(missing):
                found[text] = _one(encoded, index, self.encoder.padded)
                if write:
                    self._write(text, found[text])
        return found

    def _path(self, caption: str) -> Path:
        name = hashlib.sha256(caption.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, caption: str) -> dict[str, Tensor] | None:
        try:
            found = load_file(self._path(caption))
        except (FileNotFoundError, SafetensorError):  # absent, or damaged by a full disk
            return None
        return found if "mask" in found else None

    def _write(self, caption: str, tensors: dict[str, Tensor]) -> None:
        if self.encoder.known is not None:
            self.encoder.known.write(self.encoder.fingerprint)
        path = self._path(caption)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid4().hex}")
        save_tensors(tensors, partial)
        partial.replace(path)


def _float(condition: Condition) -> Condition:
    return Condition(condition.tokens.float(), condition.mask, condition.pooled.float())


def _one(batch: Condition, index: int, padded: bool) -> dict[str, Tensor]:
    """Return one clip's tokens, those of padding too if ``padded``, their mask, and pooled vector
    on the CPU, in memory of their own.
    """
    mask = batch.mask[index]
    kept = torch.ones_like(mask) if padded else mask
    values = {
        "tokens": batch.tokens[index, kept],
        "mask": mask[kept],
        "pooled": batch.pooled[index],
    }
    return {name: value.cpu().clone() for name, value in values.items()}


def _batch(clips: list[dict[str, Tensor]], device: torch.device) -> Condition:
    """Return a condition, padded with zeros after each clip's tokens."""
    pad = nn.utils.rnn.pad_sequence
    tokens = pad([one["tokens"] for one in clips], batch_first=True)
    mask = pad([one["mask"] for one in clips], batch_first=True)
    pooled = torch.stack([one["pooled"] for one in clips])
    return Condition(tokens.to(device), mask.to(device), pooled.to(device))
