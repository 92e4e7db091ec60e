"""Low-rank adapters (LoRA, arXiv 2106.09685) of a public network, by peft."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sora_lightning.checks import import_optional
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.layers.left_out import leave_out_frozen

if TYPE_CHECKING:
    from peft import LoraConfig


def add_lora(owner: nn.Module, lora: LoraConfig) -> None:
    """Add adapters to ``owner.network``, which alone train and stand in a state dict of ``owner``.

    Beside them it holds ``digest``, the SHA-256 of the network's weights. Loading a state that was
    trained on others raises ``ValueError``. Adapters are float32.

    Raises ``ValueError`` where a pattern matches no layer, and for what is no adapter: biases and
    whole modules that train.
    """
    network = owner.network
    assert isinstance(network, nn.Module)
    _check_kind(lora)
    _check_targets(lora, [name for name, _ in network.named_modules()])
    digest = fingerprint(network)
    try:
        import_optional("peft", "lora").inject_adapter_in_model(lora, network)
    except ValueError as error:
        raise ValueError(f"lora: {str(error).splitlines()[0]}") from error
    _check_patterns(lora, _adapted(network))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in _adapted(network).values():
        _set_magnitudes(layer)
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
    return import_optional("peft", "lora").get_peft_model_state_dict(network), config.to_dict()


def merge_adapters(network: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, in float32, and remove them."""
    if not hasattr(network, "peft_config"):
        return
    network.float()
    for layer in _adapted(network).values():
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


def _adapted(network: nn.Module) -> dict[str, Any]:
    """Return the layers that have adapters."""
    kind = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kind)}


def _set_magnitudes(layer: Any) -> None:
    """Set DoRA's magnitudes (arXiv 2402.09353) to the norms of the layer's rows in float32.

    peft computes them in the type of the weights: in bfloat16 they are rounded, so that adapters
    would change the output before they have trained.
    """
    for name, dora in layer.lora_magnitude_vector.items():
        dora.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[name].weight,
            lora_B=layer.lora_B[name].weight,
            scaling=layer.scaling[name],
        )


def _check_kind(lora: LoraConfig) -> None:
    for name, none in (("bias", "none"), ("modules_to_save", None)):
        if (value := getattr(lora, name)) != none:
            raise ValueError(
                f"lora.{name} = {value!r}: must be {none!r}: adapters alone train, which are all "
                "that diffusers' pipelines load"
            )


def _check_patterns(lora: LoraConfig, adapted: Collection[str]) -> None:
    """Raise ``ValueError`` for a key of ``rank_pattern`` or ``alpha_pattern`` that ends the name of
    no adapted layer.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, field):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                raise ValueError(
                    f"lora.{field}: no layer with an adapter ends with {key!r}; one of them is "
                    f"{next(iter(adapted))}"
                )


def _check_targets(lora: LoraConfig, names: list[str]) -> None:
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
