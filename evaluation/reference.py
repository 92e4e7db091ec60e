"""Features of the real set, kept between runs under the hashes of the data and of the protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.features.weights import read_weights
from evaluation.protocol import fingerprint


def cached_features(
    folder: Path,
    name: str,
    dataset_sha256: str,
    settings: dict[str, Any],
    compute: Callable[[], Float[Tensor, "n ..."]],
) -> Float[Tensor, "n ..."]:
    """What ``compute()`` gave for this dataset and these settings, or gives now.

    ``settings`` is all that moves the features: how clips are cut out, and the network with the
    hash of its weights. Raises ``ValueError`` for a file that is damaged, or that holds features of
    another dataset or of other settings than its name says.
    """
    record = {"dataset": dataset_sha256, "protocol": fingerprint(settings)}
    path = folder / f"{name}-{dataset_sha256[:16]}-{record['protocol'][:16]}.pt"
    if path.is_file():
        return _read(path, record)
    features = compute().float()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save({**record, "features": features, "checksum": _checksum(features)}, unfinished)
    unfinished.replace(path)
    return features


def _read(path: Path, record: dict[str, str]) -> Float[Tensor, "n ..."]:
    content = read_weights(path)
    for key, expected in record.items():
        if content.get(key) != expected:
            raise ValueError(
                f"{path}: holds features of {key} {content.get(key)}, and {expected} is asked for; "
                "remove the file"
            )
    features = content["features"]
    if content.get("checksum") != (actual := _checksum(features)):
        raise ValueError(
            f"{path}: features are {actual}, and {content.get('checksum')} was saved; "
            "remove the file"
        )
    return features


def _checksum(features: Tensor) -> str:
    return fingerprint({"shape": list(features.shape), "values": features.numpy().tobytes().hex()})
