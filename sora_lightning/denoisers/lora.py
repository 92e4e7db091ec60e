"""Low-rank adapters (LoRA, arXiv 2106.09685) of a public network, by peft."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sora_lightning.layers.fingerprint import fingerprint

if TYPE_CHECKING:
    from peft import LoraConfig


def add_lora(owner: nn.Module, lora: LoraConfig) -> None:
    """Add adapters to ``owner.network``, which alone train and stand in a state dict of ``owner``.

    Beside them it holds ``digest``, the SHA-256 of the network's weights. Loading a state that was
    trained on others raises ``ValueError``. Adapters are float32.

    Raises ``ValueError`` where a pattern matches no layer.
    """
    network = owner.network
    assert isinstance(network, nn.Module)
    _check_patterns(lora, [name for name, _ in network.named_modules()])
    on_meta = any(parameter.is_meta for parameter in network.parameters())
    digest = bytes(32) if on_meta else bytes.fromhex(fingerprint(network))
    try:
        _peft().inject_adapter_in_model(lora, network)
    except ValueError as error:
        raise ValueError(f"lora: {str(error).splitlines()[0]}") from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    owner.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
    held = {name for name, parameter in owner.named_parameters() if parameter.requires_grad}
    frozen = owner.state_dict().keys() - held - {"digest"}
    owner.register_state_dict_post_hook(partial(_drop, frozen))
    owner.register_load_state_dict_pre_hook(_check_digest)
    owner.register_load_state_dict_post_hook(partial(_do_not_expect, frozen))


def adapter_state(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the adapters' weights under peft's names, and their configuration; both are empty for
    a network without adapters.
    """
    if not (configs := getattr(network, "peft_config", {})):
        return {}, {}
    (config,) = configs.values()
    return _peft().get_peft_model_state_dict(network), config.to_dict()


def described(lora: LoraConfig) -> dict[str, Any]:
    """Return the ``class_path`` and the plain ``init_args`` that differ from the defaults."""
    default, arguments = type(lora)(), {}
    for field in fields(lora):
        value = getattr(lora, field.name)
        if field.init and value != getattr(default, field.name):
            arguments[field.name] = sorted(value) if isinstance(value, set) else value
    return {"class_path": f"peft.{type(lora).__name__}", "init_args": arguments}


def _check_patterns(lora: LoraConfig, names: list[str]) -> None:
    """Raise ``ValueError`` for a name of ``target_modules`` that ends the name of no layer."""
    if lora.target_modules is None:
        raise ValueError("lora.target_modules is missing: name layers, such as to_q and to_v")
    if isinstance(lora.target_modules, str):  # a regular expression, which peft refuses itself
        return
    for target in sorted(lora.target_modules):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names if ".attn" in name})
            raise ValueError(
                f"lora.target_modules: no layer ends with {target!r}; layers of attention end with "
                f"{', '.join(end for end in ends if not end.isdigit())}"
            )


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


def _check_digest(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    saved, own = state.get(f"{prefix}digest"), module.digest
    assert isinstance(own, Tensor)
    if saved is not None and not own.is_meta and not torch.equal(saved.cpu(), own.cpu()):
        raise ValueError(
            "the adapters were trained on other weights than those of the denoiser's folder"
        )


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError("lora needs peft: pip install 'sora-lightning[reference]'") from error
