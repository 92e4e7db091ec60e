"""Networks of diffusers, in folders that its ``save_pretrained`` wrote. It is imported when one is
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]


def diffusers_class(name: str) -> Any:
    """Return a class of diffusers. Raises ``ValueError`` where that is not installed."""
    try:
        return getattr(import_module("diffusers"), name)
    except ImportError as error:
        raise ValueError(
            f"{name} needs diffusers: pip install 'sora-lightning[reference]'"
        ) from error


def read_config(folder: Path, kinds: Collection[str], role: str, network: str, part: str) -> Config:
    """Return the configuration of a network of one of ``kinds``, the classes of diffusers that can
    be ``role``.

    ``network`` and ``part``, its name within a pipeline, say in messages what is wanted. Raises
    ``ValueError`` for a folder without a configuration, and for one of another class.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: there is no config.json here; give the folder of {network} as "
            f"diffusers' save_pretrained writes it (of a pipeline, its {part})"
        )
    config = json.loads(file.read_text())
    name = config.get("_class_name")
    if name not in kinds:
        raise ValueError(f"{folder}: holds a {name}; {role} is one of {', '.join(kinds)}")
    return config


def read_network(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a network of diffusers with its weights.

    Raises ``ValueError`` for a folder whose weights are missing, in whole or in part, or damaged.
    """
    try:
        network, info = diffusers_class(name).from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: the weights cannot be read: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: lacks weights of a {name}, such as {missing[0]}")
    return network
