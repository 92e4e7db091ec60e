"""The command ``inspect``: what a checkpoint says about the training that wrote it."""

from __future__ import annotations

from collections import Counter
from json import dumps, loads
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sora_lightning.checkpoint_shards import num_bytes
from sora_lightning.checkpoints import init_args, read_checkpoint, tokenizer_of


def inspect(checkpoint: Path, json: bool = False) -> None:
    """Print a checkpoint's step, sizes, seed, package versions, commit, configuration, and the
    fingerprints of its data and tokenizer.

    Only tensors and plain values are unpickled. What a training in Python did not record is null.

    Args:
        checkpoint: The file.
        json: Print JSON instead of YAML.
    """
    found = dumps(describe(read_checkpoint(checkpoint), checkpoint), indent=2, default=str)
    print(found if json else yaml.safe_dump(loads(found), sort_keys=False), end="")


def describe(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what ``inspect`` prints of what ``read_checkpoint`` read from ``path``."""
    arguments, provenance = init_args(content), content.get("provenance", {})
    sizes: Counter[str] = Counter()
    for name, value in content["state_dict"].items():
        sizes[name.partition(".")[0]] += value.numel() if isinstance(value, Tensor) else 0
    configuration = provenance.get("configuration")
    given = arguments.get("tokenizer")
    tokenizer = tokenizer_of(content, path) if isinstance(given, dict) else None
    return {
        "file": str(path),
        "bytes": num_bytes(content, path),
        "system": content["hyper_parameters"].get("_class_path"),
        "step": content.get("global_step"),
        "epoch": content.get("epoch"),
        "seed": None if configuration is None else configuration.get("seed_everything"),
        "values": dict(sizes),
        "averaged": "ema" in content.get("callbacks", {}),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
        "data": _data(content),
        "training_sizes": content.get("training_sizes"),
        "versions": provenance.get("versions"),
        "commit": provenance.get("commit"),
        "configuration": configuration or {"model": {"init_args": arguments}},
    }


def _data(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fingerprint of the clips and their order, and how far a training is in it."""
    loaders = content.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    states = loaders.get("combined_loader")
    state = states[0] if isinstance(states, list) and states else None
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        return None  # another program's loader
    return {"fingerprint": state.get("plan"), "batches": state.get("position"), **state["settings"]}
