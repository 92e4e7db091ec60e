"""Low-rank adapters (LoRA, arXiv 2106.09685) of a public network, by peft."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.layers.left_out import leave_out_frozen

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
    digest = fingerprint(network)
    try:
        _peft().inject_adapter_in_model(lora, network)
    except ValueError as error:
        raise ValueError(f"lora: {str(error).splitlines()[0]}") from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    leave_out_frozen(
        owner,
        digest,
        "the adapters were trained on other weights than those of the denoiser's folder",
    )


def adapter_state(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the adapters' weights under peft's names, and their configuration; both are empty for
    a network without adapters.
    """
    if not (configs := getattr(network, "peft_config", {})):
        return {}, {}
    (config,) = configs.values()
    return _peft().get_peft_model_state_dict(network), config.to_dict()


def merge_adapters(network: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, in float32, and remove them."""
    if not hasattr(network, "peft_config"):
        return
    network.float()
    for layer in network.modules():
        if isinstance(layer, import_module("peft.tuners.tuners_utils").BaseTunerLayer):
            layer.merge()
    import_module("diffusers.utils").recurse_remove_peft_layers(network)


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


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError("lora needs peft: pip install 'sora-lightning[reference]'") from error
