"""A system from its checkpoint file alone, with the weights to judge it by."""

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import lightning as L

from sora_lightning.tokenizers.load import averaged_state_dict, read_checkpoint

System = TypeVar("System", bound=L.LightningModule)


def put_specifications(checkpoint: dict[str, Any], **parts: object) -> None:
    """Put the configurations of parts that were loaded from files where the files' paths stood."""
    hyperparameters = checkpoint["hyper_parameters"]
    arguments = hyperparameters.get("init_args", hyperparameters)
    for name, part in parts.items():
        if (specification := getattr(part, "specification", None)) is not None:
            arguments[name] = specification


def load_system(kind: type[System], path: Path | str, use_ema: bool = True) -> System:
    """Build the system that a checkpoint was saved from, load its weights, freeze it, set it to
    evaluation.

    Raises ``ValueError`` where the file is missing, no checkpoint, or one of another kind of
    system.
    """
    checkpoint = read_checkpoint(path)
    class_path = checkpoint["hyper_parameters"].get("_class_path", "")
    module, _, name = class_path.rpartition(".")
    if module and not issubclass(getattr(import_module(module), name), kind):
        raise ValueError(f"{path} holds a {name}, not a {kind.__name__}")
    system = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    if use_ema:
        system.load_state_dict(averaged_state_dict(checkpoint))
    return system.eval().requires_grad_(False)
