"""Builds a tokenizer from a checkpoint file alone: configuration, averaged weights, latent
statistics.
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from sora_lightning.tokenizers.base import VideoTokenizer


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
