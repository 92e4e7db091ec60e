"""Converted weights together with a description of the model that they fill."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sora_lightning.checkpoints import build
from sora_lightning.checks import require_file
from sora_lightning.files import check_archive, save_tensors
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import TokenGrid

# Before each name of a DistributedDataParallel, and of a compiled module.
_WRAPPERS = ("module.", "_orig_mod.")
_METADATA = "sora_lightning"  # the key of the safetensors metadata that holds the parts


@dataclass(frozen=True)
class Pretrained:
    """Weights under the names of this package, and the parts that they fill.

    ``parts`` maps a part's name (denoiser, conditioner, encoder) to its ``class_path`` and
    ``init_args``, as in a YAML; the names in ``weights`` begin with it. ``grid`` is the token grid
    of the foreign file's fixed tables of positions, if it has any. Networks here compute their
    positions for any grid.
    """

    parts: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    grid: TokenGrid | None = None

    def build(self) -> dict[str, nn.Module]:
        """Return each part with its weights, in evaluation mode.

        Raises ``ValueError`` for weights that do not fill the parts exactly.
        """
        modules = nn.ModuleDict(
            {name: build(nn.Module, part, name) for name, part in self.parts.items()}
        )
        try:
            modules.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return dict(modules.eval().items())

    def init_args(self, part: str) -> dict[str, Any]:
        """Return the arguments of a part. Raises ``ValueError`` for a part that does not exist."""
        if part not in self.parts:
            raise ValueError(f"there is no {part} in it; there is {', '.join(self.parts)}")
        return self.parts[part]["init_args"]

    def known_grid(self) -> TokenGrid:
        """Return ``grid``. Raises ``ValueError`` if it is unknown."""
        if self.grid is None:
            raise ValueError("the other side has tables of positions: say for which grid of tokens")
        return self.grid

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata holds the parts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {"parts": self.parts, "grid": None if self.grid is None else asdict(self.grid)}
        save_tensors(self.weights, path, {_METADATA: json.dumps(held)})

    @classmethod
    def load(cls, path: Path) -> Pretrained:
        """Read a file that ``save`` wrote. Raises ``ValueError`` for any other file."""
        weights, metadata = _read_safetensors(path)
        if _METADATA not in metadata:
            raise ValueError(f"{path}: does not say which model it fills")
        held = json.loads(metadata[_METADATA])
        grid = None if held["grid"] is None else TokenGrid(**held["grid"])
        return cls(held["parts"], weights, grid)


def converted_tokenizer(path: Path) -> VideoTokenizer:
    """Return the frozen tokenizer of a file that ``sora-lightning convert`` wrote.

    Raises ``ValueError`` for any other file.
    """
    path = Path(path)
    pretrained = Pretrained.load(path)
    tokenizer = pretrained.build().get("tokenizer")
    if not isinstance(tokenizer, VideoTokenizer):
        raise ValueError(f"{path}: holds {', '.join(pretrained.parts)}, and no tokenizer")
    tokenizer.specification = pretrained.parts["tokenizer"]
    return tokenizer.requires_grad_(False)


def describe(target: Any, **init_args: Any) -> dict[str, Any]:
    """Return a class as ``class_path`` and ``init_args``."""
    return {"class_path": f"{target.__module__}.{target.__qualname__}", "init_args": init_args}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights and the metadata of a file."""
    require_file("weights", path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Return the weights of a ``.safetensors`` file or of one that ``torch.save`` wrote.

    Of a training's state these are its ``ema``, or else its ``model``. The prefixes of
    ``DistributedDataParallel`` and ``torch.compile`` are removed. Only tensors and plain values are
    unpickled. Raises ``ValueError`` for a file that holds no weights.
    """
    if path.suffix == ".safetensors":
        return _without_prefix(_read_safetensors(path)[0])
    require_file("weights", path)
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a training
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path}: holds more than weights, or none ({error})") from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            break
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ValueError(f"{path}: is not a table of weights")
    return _without_prefix(held)


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if weights and all(name.startswith(prefix) for name in weights):
            bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
            return _without_prefix(bare)
    return dict(weights)


def write_foreign(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a ``.safetensors`` file, or for any other suffix one for ``torch.load``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_tensors(weights, path)
    else:
        torch.save(dict(weights), path)
