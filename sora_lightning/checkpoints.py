"""What is inside a checkpoint, and how a tokenizer or a system is built from one file alone."""

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from sora_lightning.tokenizers.base import VideoTokenizer

System = TypeVar("System", bound=L.LightningModule)


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """A Lightning checkpoint, on the CPU, tensors and plain values only.

    Raises ``ValueError`` naming the path where there is no file or the file is no checkpoint of a
    system.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "hyper_parameters"} <= checkpoint.keys()
    ):
        raise ValueError(f"{path} is no Lightning checkpoint with weights and hyperparameters")
    return checkpoint


def averaged_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to judge by: the exponential moving average where the run kept one, else the last
    ones.
    """
    average = checkpoint.get("callbacks", {}).get("ema", {}).get("weights", {})
    return {**checkpoint["state_dict"], **average}


def init_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the checkpoint's system was built from."""
    hyperparameters = checkpoint["hyper_parameters"]
    return hyperparameters.get("init_args", hyperparameters)


def load_tokenizer(checkpoint: Path) -> VideoTokenizer:
    """The tokenizer of a system's checkpoint, with averaged weights, frozen. Any system that holds
    one will do.

    Raises ``ValueError`` where the file is missing or holds no tokenizer.
    """
    content = read_checkpoint(checkpoint)
    specification = init_args(content).get("tokenizer")
    if not isinstance(specification, dict):
        raise ValueError(f"{checkpoint} was not trained with a tokenizer from a configuration")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VideoTokenizer, "tokenizer")
    tokenizer = parser.instantiate(parser.parse_object({"tokenizer": specification})).tokenizer
    prefix = "tokenizer."
    tokenizer.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in averaged_state_dict(content).items()
            if name.startswith(prefix)
        }
    )
    tokenizer.specification = specification
    return tokenizer.requires_grad_(False).eval()


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
