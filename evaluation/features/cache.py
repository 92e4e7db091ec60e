"""Cache of the reference's features, keyed by the hashes of the data and of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.features.weights import read_weights
from evaluation.fingerprint import fingerprint


@dataclass(frozen=True)
class FeatureCache:
    """Cached features of a dataset.

    ``settings`` holds everything that affects the features: how clips are cut, and the network with
    the hash of its weights.
    """

    folder: Path
    name: str
    dataset_sha256: str
    settings: dict[str, Any]

    @property
    def record(self) -> dict[str, str]:
        return {"dataset": self.dataset_sha256, "protocol": fingerprint(self.settings)}

    @property
    def path(self) -> Path:
        dataset, protocol = (value[:16] for value in self.record.values())
        return self.folder / f"{self.name}-{dataset}-{protocol}.pt"

    def read(self) -> Float[Tensor, "n ..."] | None:
        """Return the features, or ``None`` if they are not cached.

        Raises ``ValueError`` for a file that is damaged, or that holds features of another dataset
        or other settings.
        """
        if not self.path.is_file():
            return None
        content = read_weights(self.path)
        for key, expected in self.record.items():
            if content.get(key) != expected:
                raise ValueError(
                    f"{self.path}: holds features of {key} {content.get(key)}, and {expected} is "
                    "asked for; remove the file"
                )
        features = content["features"]
        if content.get("checksum") != (actual := _checksum(features)):
            raise ValueError(
                f"{self.path}: features are {actual}, and {content.get('checksum')} was saved; "
                "remove the file"
            )
        return features

    def write(self, features: Float[Tensor, "n ..."]) -> None:
        """Write the features to the cache atomically."""
        features = features.float()
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".part")
        content = {**self.record, "features": features, "checksum": _checksum(features)}
        torch.save(content, unfinished)
        unfinished.replace(self.path)


def _checksum(features: Tensor) -> str:
    return fingerprint({"shape": list(features.shape), "values": features.numpy().tobytes().hex()})
