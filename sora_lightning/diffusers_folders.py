"""Networks and pipelines of diffusers, in folders that its ``save_pretrained`` wrote or in
repositories of the hub. It is imported when one is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sora_lightning.checks import import_optional

Config = dict[str, Any]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGURATIONS = ("*.json", "*.txt", "*.model")  # with the vocabularies of tokenizers
_WEIGHTS = "*.safetensors"
_VARIANTS = ["*.fp16*", "*.bf16*", "*.non_ema*"]  # further copies of the weights


def part_of_pipeline(folder: Path, *parts: str) -> Path:
    """Return the folder of a part, such as ``vae``, if ``folder`` is that of a diffusers pipeline
    (with ``model_index.json``), else ``folder``. Of several names it is the first that exists.

    ``folder`` may be a name on the hub: see ``local_folder``.
    """
    folder = local_folder(folder, *parts)
    if not (folder / "model_index.json").is_file():
        return folder
    return next((folder / part for part in parts if (folder / part).is_dir()), folder / parts[0])


def local_folder(folder: Path, *parts: str) -> Path:
    """Return the folder, or, if it is a name on the hub such as
    ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``, the repository's copy in the hub's cache.

    A name is of the hub where no folder is called as its owner. Of a pipeline only ``parts`` are
    downloaded, by default all of its index; and only configurations, vocabularies and safetensors,
    so that nothing is unpickled or run. On the meta device no weights are.

    Raises ``ValueError`` for what is neither in the cache nor to be had from the hub.
    """
    name = folder.as_posix()
    if not _HUB_NAME.fullmatch(name) or Path(folder.parts[0]).exists():
        return folder
    index = _snapshot(name, ["model_index.json", "config.json"]) / "model_index.json"
    kinds = [*_CONFIGURATIONS, *([] if torch.empty(0).is_meta else [_WEIGHTS])]
    if not index.is_file():
        return _snapshot(name, kinds)
    held = [key for key, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    wanted = [part for part in held if not parts or part in parts]
    return _snapshot(name, ["model_index.json", *(f"{p}/{kind}" for p in wanted for kind in kinds)])


def _snapshot(name: str, patterns: list[str]) -> Path:
    hub = import_optional("huggingface_hub", f"{name}: no such folder; a name on the hub")
    try:
        path = hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=_VARIANTS)
    except (OSError, ValueError) as error:  # requests that fail are OSErrors
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{name}: no such folder, and as a name on the hub it is neither in the cache "
            f"{hub.constants.HF_HUB_CACHE} nor to be had ({reason}): give a folder, or fetch it "
            f"where there is a network by `hf download {name}`"
        ) from error
    return Path(path)


def diffusers_class(name: str) -> Any:
    """Return a class of diffusers. Raises ``ValueError`` where that is not installed."""
    return getattr(import_optional("diffusers", name), name)


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


def cast_as_read(network: Any, dtype: torch.dtype) -> None:
    """Cast a network's weights as ``read_network`` does, which leaves some in float32."""
    kept = set(network._keep_in_fp32_modules or ())
    for name, parameter in network.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
