"""Frozen weights that stay in the files that they came from, out of state dicts."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sora_lightning.layers.fingerprint import fingerprint


def leave_out_frozen(module: nn.Module, digest: str, refusal: str) -> None:
    """Leave what does not train of a module out of its state dict, buffers included.

    In its place stands the buffer ``digest``, the SHA-256 of its files' weights in hexadecimal.
    Loading a state with another one raises ``ValueError`` with the sentence ``refusal``; modules on
    the meta device are not compared.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    frozen = module.state_dict().keys() - trained
    module.register_buffer("digest", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
    module.register_state_dict_post_hook(partial(_drop, frozen))
    module.register_load_state_dict_pre_hook(partial(_check_digest, refusal))
    module.register_load_state_dict_post_hook(partial(_do_not_expect, frozen))


def leave_in_folder(part: nn.Module, name: str, folder: Path) -> None:
    """Leave the frozen weights of a pipeline's part, of this name in messages, in its folder.

    Loading a state that was trained with others raises ``ValueError``.
    """
    refusal = f"the weights were trained with another {name} than that of {folder}"
    leave_out_frozen(part, fingerprint(part), refusal)


def _drop(
    names: Set[str], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    for name in names:
        state.pop(f"{prefix}{name}", None)


def _do_not_expect(names: Set[str], module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not _ends_with(key, names)]


def _ends_with(key: str, names: Set[str]) -> bool:
    """Return True if one of the names is the key, or what follows one of its dots."""
    steps = key.split(".")
    return any(".".join(steps[first:]) in names for first in range(len(steps)))


def _check_digest(
    refusal: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    saved, own = state.get(f"{prefix}digest"), module.digest
    assert isinstance(own, Tensor)
    if saved is not None and not own.is_meta and not torch.equal(saved.cpu(), own.cpu()):
        raise ValueError(refusal)
