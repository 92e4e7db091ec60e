"""Contents of a checkpoint, and the tokenizer or system that is built from it alone."""

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile, is_zipfile

import lightning as L
import torch
import torch.nn.functional as F
from einops import rearrange
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_lightning.checkpoint_shards import with_shards
from sora_lightning.checks import naming
from sora_lightning.configuration import configuration
from sora_lightning.denoisers import Denoiser
from sora_lightning.files import check_archive
from sora_lightning.layers.left_out import leave_in_folder
from sora_lightning.tokenizers.base import VideoTokenizer
from sora_lightning.trust import check_class_paths, import_class

Part = TypeVar("Part", bound=nn.Module)
System = TypeVar("System", bound=L.LightningModule)

MODEL_WEIGHTS, MODEL_CONFIG = "model.safetensors", "config.json"

# What has values by name, where it is there.
_TABLES = (
    "state_dict",
    "hyper_parameters",
    "callbacks.ema.weights",
    "provenance.configuration",
    "loops.fit_loop.state_dict",
)

_INPUT = "denoiser.x_in.weight"


def read_checkpoint(path: Path | str, verify: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU; only tensors and plain values are unpickled.

    The folder that ``convert --target model`` wrote, or its file of weights, is read as one. With
    ``verify`` the file of a training is read whole and compared with its checksums; of tensors that
    lie beside it, the files' lengths are compared, and none is read.

    Raises ``ValueError`` with the path if it is missing, damaged or no checkpoint of a system.
    """
    path = Path(path)
    path = path / MODEL_WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.name == MODEL_WEIGHTS:
        return _read_model(path)
    if not is_zipfile(path):
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged or something else")
    try:
        check_archive(path)
        if verify and (damaged := ZipFile(path).testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} in it is another")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint = with_shards(checkpoint, path, read=not verify)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "hyper_parameters"} <= checkpoint.keys()
    ):
        raise ValueError(f"{path} is no Lightning checkpoint with weights and hyperparameters")
    return _checked(checkpoint, path)


def _read_model(path: Path) -> dict[str, Any]:
    """Return a model's folder as a checkpoint without callbacks and optimizers."""
    try:
        config = json.loads(path.with_name(MODEL_CONFIG).read_text())
        states = config.pop("states")
        content = {**config, "state_dict": load_file(path) | states}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path.parent} cannot be read as a model's folder: {error}") from error
    return _checked(content, path)


def _checked(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content. Raises ``ValueError`` naming the first part of another type."""
    for table in _TABLES:
        part: Any = checkpoint
        keys = table.split(".")
        for depth, key in enumerate(keys, start=1):
            if key not in part:
                break
            part = part[key]
            if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
                raise ValueError(f"{path}: its {'.'.join(keys[:depth])} holds no values by name")
    sizes = checkpoint.get("training_sizes", [])
    if not isinstance(sizes, list) or not all(isinstance(size, str) for size in sizes):
        raise ValueError(f"{path}: its training_sizes are no list of sizes")
    return checkpoint


def averaged_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averaged weights (EMA) where the run kept them, else the last ones."""
    average = checkpoint.get("callbacks", {}).get("ema", {}).get("weights", {})
    return {**checkpoint["state_dict"], **average}


def init_args(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the checkpoint's system was built from."""
    return {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}


def build(kind: type[Part], configuration: Any, source: Path | str) -> Part:
    """Build the ``kind`` that a ``class_path`` with ``init_args`` from a file describes.

    Raises ``ValueError`` naming ``source``, before anything is imported or built, for a class of
    another package than those of ``sora_lightning.trust``, and for one that is no ``kind``.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part")
    try:
        check_class_paths(configuration)
        return parser.instantiate(parser.parse_object({"part": configuration})).part
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def load_tokenizer(checkpoint: Path) -> VideoTokenizer:
    """Load the tokenizer of any system's checkpoint, with averaged weights, frozen.

    Raises ``ValueError`` if the file is missing or holds no tokenizer.
    """
    return tokenizer_of(read_checkpoint(checkpoint), checkpoint)


def tokenizer_of(content: dict[str, Any], checkpoint: Path) -> VideoTokenizer:
    """Return the tokenizer of what ``read_checkpoint`` read. See ``load_tokenizer``."""
    arguments = init_args(content)
    specification, pipeline = arguments.get("tokenizer"), arguments.get("pipeline")
    folder = pipeline["folder"] if specification is None and isinstance(pipeline, dict) else None
    if folder is not None:
        path = "sora_lightning.tokenizers.pretrained_tokenizer"
        specification = {"class_path": path, "init_args": {"path": folder}}
    if not isinstance(specification, dict):
        raise ValueError(f"{checkpoint} was not trained with a tokenizer from a configuration")
    tokenizer = build(VideoTokenizer, specification, checkpoint)  # type: ignore[type-abstract]
    if folder is not None:  # of its weights the checkpoint has the digest alone
        leave_in_folder(tokenizer, "autoencoder", Path(folder))
    prefix = "tokenizer."
    weights = averaged_state_dict(content)
    load_weights(
        tokenizer,
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
        checkpoint,
    )
    tokenizer.specification = specification
    return tokenizer.requires_grad_(False).eval()


def plain_hyperparameters(system: L.LightningModule) -> dict[str, Any]:
    """Return what ``system`` is built from, without objects: parts are described by ``class_path``.

    A part that was loaded from a file is described by its own configuration. Raises ``ValueError``
    naming the first part that a checkpoint cannot describe.
    """
    parameters = inspect.signature(type(system).__init__).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    values = {
        name: value
        for name, value in system.hparams.items()  # those of base classes, too
        if takes_any or name in parameters or name.startswith("_")
    }
    for name in parameters:
        if name not in values and hasattr(system, name):  # Lightning drops what is not pickled
            values[name] = getattr(system, name)
    hyperparameters = {name: configuration(value, name) for name, value in values.items()}
    for name in hyperparameters:
        if (
            specification := getattr(getattr(system, name, None), "specification", None)
        ) is not None:
            hyperparameters[name] = specification
    kind = type(system)
    hyperparameters.setdefault("_class_path", f"{kind.__module__}.{kind.__qualname__}")
    # By this, Lightning's load_from_checkpoint builds the parts.
    hyperparameters["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    return hyperparameters


def load_system(kind: type[System], path: Path | str, use_ema: bool = True) -> System:
    """Load a system from its checkpoint, frozen and in evaluation mode.

    Raises ``ValueError`` if the file is missing, no checkpoint, or holds another kind of system.
    """
    checkpoint = read_checkpoint(path)
    class_path = checkpoint["hyper_parameters"].get("_class_path")
    if not isinstance(class_path, str):
        raise ValueError(
            f"{path} does not name the system that it holds (hyper_parameters._class_path): it was "
            "saved by another program"
        )
    with naming(f"{path}:"):
        held = import_class(class_path)
    if not (isinstance(held, type) and issubclass(held, kind)):
        raise ValueError(f"{path} holds a {held.__name__}, not a {kind.__name__}")
    system = build(kind, {"class_path": class_path, "init_args": init_args(checkpoint)}, path)
    weights = averaged_state_dict(checkpoint) if use_ema else checkpoint["state_dict"]
    load_weights(system, weights, path)
    with naming(f"{path}:"):
        system.on_load_checkpoint(checkpoint)
    return system.eval().requires_grad_(False)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Load all weights of a module. Raises ``ValueError`` naming ``source`` if they do not fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"{source}: its weights do not fit: {first[0].strip()}") from error


@torch.no_grad()
def start_weights(module: L.LightningModule, checkpoint: Path) -> None:
    """Copy the trainable weights of another training's checkpoint.

    Input channels that only this denoiser has start at 0 (InstructPix2Pix, arXiv
    2211.09800, section 3.2.1). Parts whose state is no tensor, as a vocabulary is, take theirs.

    Raises ``ValueError`` naming the first weight that is missing or of another shape.
    """
    found = averaged_state_dict(read_checkpoint(checkpoint))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in found:
            raise ValueError(f"checkpoint.start_from = {str(checkpoint)!r}: holds no {name}")
        weight = found[name]
        if name == _INPUT and parameter.shape[-1] > weight.shape[-1]:
            weight = _more_channels(weight, parameter.shape[-1], module)
        if weight.shape != parameter.shape:
            raise ValueError(
                f"checkpoint.start_from = {str(checkpoint)!r}: {name} is {tuple(weight.shape)}, "
                f"and this model's is {tuple(parameter.shape)}"
            )
        parameter.copy_(weight)
    for name, part in module.named_modules():
        if (state := found.get(f"{name}._extra_state")) is not None:
            part.set_extra_state(state)


def _more_channels(weight: Tensor, width: int, module: L.LightningModule) -> Tensor:
    """Append input channels of weight 0; a patch orders its values as positions x channels."""
    assert isinstance(module.denoiser, Denoiser)
    positions = module.denoiser.patch.volume
    apart = rearrange(weight, "d (p c) -> d p c", p=positions)
    more = (width - weight.shape[-1]) // positions
    return rearrange(F.pad(apart, (0, more)), "d p c -> d (p c)")
